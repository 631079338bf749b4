"""Which neurons a real text uses: recorded once, then replayed against cache policies, orders and
bundlings, without a disk. Read `trace.py` first."""
