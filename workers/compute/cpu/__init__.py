"""Compute on the CPU. Read `device.py` first: a step of a predicted set goes through `token.py`, compiled
kernels for one token; a step of every unit through `batch.py`, matrix products for many. Experts of
both are in `experts.py`.
"""
