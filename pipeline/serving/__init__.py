"""Serving: one warm ring for many callers, over ZeroMQ, over HTTP and inside a program.

Read `client_messages.py` first, then `warm_ring.py` (one answer), `scheduler.py` (whose turn it is), and the
fronts: `server.py`, `http/`, `embed.py`. The other side is `conversation.py`, then `client.py`.
"""
