"""The planner: from a configuration to the plan of one ring, before any process starts.

Read `resolve.py` first (what is left open, decided), then `divide.py` (who gets how much memory) and
`budget.py` (what a budget says). `probe.py` tells people what a token will cost.
"""
