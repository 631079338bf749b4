"""What it costs to give only some neurons their true rows, in models without zeros. docs/dial.md.

Read `variant.py` first (who is chosen, and what the others get), then `copies.py` (low-bit rows), `layer.py`
(one FFN's arithmetic), `passes.py` (all variants through a text, layer by layer), `calibration.py` (centres,
thresholds and errors from one text) and `points.py` (the dial's points to a budget of loss).
"""
