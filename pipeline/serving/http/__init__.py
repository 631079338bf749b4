"""The HTTP front: `server.py` listens, `guard.py` lets in, `api.py` answers, `refusal.py` says no."""
