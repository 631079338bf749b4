"""Checkpoint in, store out: bounded memory, resumable, atomic. FORMAT.md, "Writing".

Read `conversion.py` first: what is checked before anything is written. `write.py` then writes the bundles
layer by layer, recording each synced layer (`journal.py`), streams the resident tensors, copies the
tokenizer, writes the manifest and renames. Memory is bounded by one layer's FFN matrices.
"""

from storage.convert.conversion import NeuronOrder as NeuronOrder
from storage.convert.conversion import read_order as read_order
from storage.convert.write import convert as convert
