"""What joins the workers. Read `messages.py` first, then `supervisor.py`, then `generate.py`."""
