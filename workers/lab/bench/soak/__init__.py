"""A long run: one server, clients of every kind, workers that die, and what the server holds meanwhile.

`python -m workers.lab.bench.soak --minutes 30` is it. Read `clients.py` (who asks what, and what is right),
`vitals.py` (what is recorded), `running.py` (the server), `__main__.py`.
"""
