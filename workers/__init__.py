"""The four worker processes, one package each; `python -m workers.NAME` runs one.

Reading order is data order: `compute`, `predictor`, `cache`, `prefetcher`.
"""

PROJECT = "flashring"  # tells our package from another of the same name
