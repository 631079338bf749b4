"""Fuzzing of everything that decodes what others have written.

`python -m workers.lab.fuzz --minutes 10` gives each decoder that long; tests give each a second. Read
`inputs.py` (what they are given), `targets.py` (what may come of it), `__main__.py`.
"""
