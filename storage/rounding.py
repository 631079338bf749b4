"""What fewer bits cost a store's model, where that was measured: `quality.json` in the store.

`python -m workers.lab.evaluation.bits --save` writes it. Nothing depends on it: a damaged one counts as none.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from storage import files
from storage.errors import StoreError, reason
from storage.records import read_record
from storage.store import Store

QUALITY = "quality.json"


@dataclass(frozen=True, slots=True)
class RoundingCost:
    """Against the same weights in 16 bits, every neuron computed."""

    bits: int
    perplexity: float  # its change: 0.01 is one per cent more
    tokens: int  # of the text
    text: str  # its name

    def describe(self) -> str:
        return (
            f"{self.bits} bits: perplexity {self.perplexity:+.2%} against 16 bits "
            f"({self.tokens:,} tokens of {self.text})"
        )


def read_cost(store: Store) -> RoundingCost | None:
    """None where it was not measured."""
    try:
        return read_record(RoundingCost, json.loads((store.path / QUALITY).read_text(encoding="utf-8")))
    except (OSError, ValueError, RecursionError):
        return None


def write_cost(store: Store, cost: RoundingCost) -> None:
    """Raises StoreError for a store that cannot be written."""
    try:
        files.write_whole(store.path / QUALITY, (json.dumps(asdict(cost)) + "\n").encode(), shared=True)
    except OSError as error:
        raise StoreError(f"{store.path / QUALITY} cannot be written: {reason(error)}") from error
