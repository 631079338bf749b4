"""The predictor: hidden states in, neurons out.

Reading order: `targets.py` (what is predicted when), `scorer.py` (what predicts), `scorers.py`,
`lowrank.py`, `oracle.py`, `router.py`, `prediction.py` (messages), `__main__.py`.
"""
