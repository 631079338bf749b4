"""Synthetic mixtures of experts, written straight into a store in few bits, with planted routing.

A checkpoint of 30 billion weights in 16 bits would take 60 GB, which nobody needs: here the store's codes are
drawn as they will lie there, tensor by tensor, and a GGUF file for other programs is made of the store.
Read `planting.py` first (what routers are to see, and why), then `tensors.py` (every tensor), `origin.py`
(what a conversion reads) and `routing.py` (what came of it).
"""
