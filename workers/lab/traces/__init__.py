"""Which neurons a real text uses: recorded once, then replayed without a disk.

The replay compares cache policies, orders and bundlings. Read `offline/trace.py` first.
"""
