"""`run.py bench-serving`: what serving costs a token over a session alone."""
