"""`run.py bench`: what a store costs a token, beside what the hardware could do and what others take.

Start with `bench.py`, which runs the rows of `ablation.py` and `peers.py` in turn (`series.py`), then the
other parts: `curve.py`, `disk.py`, `roofline.py`. Everything that is measured runs in processes of its own
(`children.py`), so that one measurement leaves nothing behind for the next; `rows.py` is what a measured
ring comes to, `table.py` and `plots.py` show it.
"""
