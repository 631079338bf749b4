"""`run.py bench`: what a store costs a token, beside what the hardware could do and what others take.

Start with `bench.py`, which measures the parts in turn: `ablation.py`, `curve.py`, `disk.py`, `roofline.py`,
`peers.py`. Everything that is measured runs in processes of its own (`children.py`), so that one
measurement leaves nothing behind for the next; `rows.py` is what a measured ring comes to, `table.py` and
`plots.py` show it.
"""
