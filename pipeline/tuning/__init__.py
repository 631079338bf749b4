"""`run.py tune`: a search for settings that are quicker on this machine, and no text changes.

Read `knobs.py` first (what may be turned), then `search.py` (how, with any measure), `trial.py` (the
measure: a warm ring and forced tokens) and `document.py` (the file that is written).
"""
