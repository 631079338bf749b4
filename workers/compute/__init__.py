"""compute: resident weights, KV cache, the layer loop.

Read `engine.py` first: it is one token's way through the layers. `blocks.py` says what a layer is;
`token.py` computes it for one token with numba, `batch.py` for many with torch; `parts.py` collects
the bundles as they arrive; `dense.py` runs the same mathematics without a ring.
"""
