"""The built-in models: a checkpoint of this package with the predictors that were trained for it, and a
mixture of experts in a GGUF file.
"""

from __future__ import annotations

from pipeline.config import Model
from pipeline.launch import ROOT
from storage import predictors
from storage.rounding import RoundingCost, read_cost, write_cost
from storage.store import Store

NAME = "builtin"
CHECKPOINT = ROOT / "storage" / "builtin"
MIXTURE = "builtin-moe"
MIXTURE_FILE = CHECKPOINT / "moe.gguf"
PREDICTORS = "predictors.safetensors"  # beside the checkpoint; copied into its store
# What `evaluation.bits --save` found on 12,000 tokens of the validation stories (docs/lowbits.md).
COSTS = {
    8: RoundingCost(8, 0.0004, 12_000, "held-out stories"),
    4: RoundingCost(4, 0.0085, 12_000, "held-out stories"),
}


# The same of the mixture's four bits, whatever its store makes of them.
MIXTURE_COST = RoundingCost(4, 0.0020, 12_000, "held-out stories")


def install_mixture(store: Store) -> None:
    """Give the built-in mixture's store what was measured for it."""
    if read_cost(store) is None:
        write_cost(store, MIXTURE_COST)


def install(store: Store, bits: int | None) -> None:
    """Give the built-in model's store what was measured and trained for it.

    The predictors were trained on the weights as shipped, and serve those in fewer bits as well.
    """
    if (CHECKPOINT / PREDICTORS).is_file():
        predictors.install(store, Model().predictor, CHECKPOINT / PREDICTORS)
    if bits in COSTS and read_cost(store) is None:
        write_cost(store, COSTS[bits])
