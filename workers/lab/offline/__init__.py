"""The whole model without a ring, and the ring's choices replayed on it.

Read `dense.py` first (every neuron), then `chooser.py` (the sets that a ring would compute), `scoring.py`
(log-probabilities), `record.py`, `trace.py` and `replay.py` (what was used, and what a policy makes of it).
"""
