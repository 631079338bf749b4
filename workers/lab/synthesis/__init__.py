"""Synthetic checkpoints: published shapes, planted activity, and the program that measures it.

Every number from such a checkpoint is synthetic: it says how fast a system is, nothing about a
model's quality. Read `planting.py` first (what is planted, and why), then `generate.py` (a layer is
made, run and adjusted), `block.py` (the dense reference both use) and `measure.py`.
"""
