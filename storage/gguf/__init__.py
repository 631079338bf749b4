"""A GGUF file as a checkpoint: names, settings and tokenizer as Hugging Face's files have them.

Read `file.py` first. `header.py` reads what stands before the tensors, `settings.py` makes a `config.json` of
it (of a mixture, `mixtures.py`), `names.py` says which tensor of the file a checkpoint's tensor is,
`tensors.py` widens one, and `tokenizer.py` builds the tokenizer.
"""
