"""What joins the workers. Read `messages.py` first, then `supervisor.py`, then `generate.py`."""

PROJECT = "flashring"  # tells our package from another of the same name
