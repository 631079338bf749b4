"""compute: resident weights, KV cache, the layer loop.

Read `engine.py` first: it is one token's way through the layers. `blocks.py` says what a layer is;
`cpu/token.py` computes it for one token by compiled kernels, `cpu/batch.py` for many by matrix products;
`torch/` computes both on a device that torch has, such as a GPU. `parts.py` collects the bundles as they
arrive. `compiling.py` makes the kernels ready before all that.
"""
