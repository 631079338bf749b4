"""`run.py train-predictor`: learns, from what a text activates, which neurons a hidden state will need.

Read `activations.py` first (the samples), then `fit.py` and `svd.py` (two ways to a map), `report.py` (how
good it is) and `__main__.py`. `frontier.py` compares ranks and thresholds.
"""
