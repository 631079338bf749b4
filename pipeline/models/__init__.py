"""Which model is meant, and where its store is.

Start with `names.py`, then `stores.py`; checkpoints come from `hub.py`, `builtin.py` or a directory.
"""
