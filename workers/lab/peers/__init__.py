"""Programs that run other packages: for `run.py bench --peers` by the Python of an environment that has them.

They import nothing of ours. `common.py` times and reports; `llama_cpp.py` is llama.cpp, which also writes
texts for `workers.lab.evaluation.greedy`.
"""
