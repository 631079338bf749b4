"""Model families: one file each, read by `convert` and by compute.

A family turns a Hugging Face `config.json` into an `Architecture` and names the checkpoint's
tensors. Start with `architecture.py`, then `opt.py`; gated decoders are `llama.py`,
`decoder.py` with what they share, and files that say how each differs.
"""
