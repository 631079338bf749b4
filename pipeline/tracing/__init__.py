"""A run's timeline: from the stamps of a ring's workers to a file that Perfetto shows, and to words.

Read `slices.py` (what each worker did when), then `trace.py` (the file), `reading.py` (its parts a token) and
`bound.py` (what bounds the run). `recording.py` is what `--timeline FILE` does.
"""
