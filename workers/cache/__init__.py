"""The DRAM cache manager: which neuron sits in which slot. It moves no bytes.

Reading order: `policy.py`, `frequency.py` and `policies.py` (who leaves), `residency.py` (one layer's slots),
`staging.py` (the two halves), `layers.py` (messages in, messages out), `__main__.py`; `recording.py` keeps
sets for traces.
"""
