"""Programs that run other packages for `run.py bench --peers`, each by the Python of its own environment.

They import nothing of ours. `common.py` times and reports.
"""
