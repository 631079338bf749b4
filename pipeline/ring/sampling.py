"""How a token is chosen from the model's logits: one record for all between a caller and compute.

`workers/compute/sampling.py` does what it says; `config.Decoding` has what holds where nobody says.
"""

from __future__ import annotations

from dataclasses import dataclass

from storage.errors import UsageError


@dataclass(frozen=True, slots=True)
class Sampling:
    """How to choose a token."""

    temperature: float = 0.0  # 0: the most likely token, the lowest id among equals
    top_k: int = 0  # 0: no limit
    top_p: float = 1.0  # 1: no limit
    seed: int = 0

    def check(self) -> None:
        """Raises UsageError naming the first value out of range."""
        rules = (
            (0.0 <= self.temperature < float("inf"), "temperature must be zero or a positive number"),
            (0 <= self.top_k < 2**31, "top_k must be between 0 and 2**31 - 1"),
            (0.0 < self.top_p <= 1.0, "top_p must be above 0 and at most 1"),
            (0 <= self.seed < 2**63, "seed must be between 0 and 2**63 - 1"),
        )
        for holds, sentence in rules:
            if not holds:
                raise UsageError(sentence)
