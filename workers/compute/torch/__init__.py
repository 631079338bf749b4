"""Compute on any device that torch has; the dense reference is made of it, too.

Read `device.py` first, then `weights.py` (what is resident), `attention.py`, `shelf.py` (how units come over,
and which stay) and `ffn.py`. `making.py` makes a ring's device, `pages.py` locks memory for it; `probe.py`
asks torch which there are.
"""
