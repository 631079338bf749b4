"""The ring: four worker processes, what they say to each other, and one session over them.

Read `messages.py` first, then `segments.py` and `plan.py` (what they share), `supervisor.py` (their life)
and `session.py` (one generation). `process.py` and `channel.py` are each worker's own side.
"""
