"""What this machine does, measured for plans within seconds: `python -m workers.probe FILE` prints it as
JSON.

`__main__.py` is the whole of it: reads of the disk (`reads.py`, the prefetcher's own code), of the memory
and the kernels' products (`memory.py`), and a message between two processes (`hops.py`). What the figures
mean for a token, `pipeline/planner/pace.py` says.
"""
