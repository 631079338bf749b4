"""The planner: from a configuration to the plan of one ring, before any process starts.

Read `resolve.py` first (what is left open, decided), then `divide.py` (who gets how much memory) and
`budget.py` (what a budget says). `probe.py` tells people what a token will cost where all of it is read.

Beside that stands what a plan means in time: `pace.py` is the model, `work.py` counts what a token needs,
`rates.py` has what this machine does, and `survey.py` puts them together for `run.py plan`.
"""
