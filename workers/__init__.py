"""The four worker processes, one package each; `python -m workers.NAME` runs one.

Reading order is data order: `compute`, `predictor`, `cache`, `prefetcher`. `kernels` is the arithmetic that
compute and predictor share, `loop.py` what a worker does between messages. `lab` is no worker.
"""

PROJECT = "flashring"  # tells our package from another of the same name
