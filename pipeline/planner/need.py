"""How a mixture's slots are divided among its layers: where a further one brings most hits.

A store may hold `needs.json`, which `run.py trace needs` writes from a recorded trace: `store`, the identity
of the weights; `wanted`, how often the trace wanted an expert; and of each layer `hits`, how often LRU would
have had it with 0, 1 … as many slots as experts. Without it all layers get the same number.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from storage.errors import StoreError, reason
from storage.files import write_whole
from storage.store import Store

FILE: Final = "needs.json"
# Of the misses: with less to save the layers stay alike, since another text's needs differ by as much.
WORTH: Final = 0.05


@dataclass(frozen=True, slots=True)
class Needs:
    """What slots bring in each layer."""

    store: str
    wanted: int
    hits: tuple[tuple[int, ...], ...]  # [layers][slots]

    @classmethod
    def of(cls, store: Store) -> Needs | None:
        """A store's; None where nobody recorded them. Raises StoreError for damage and for other weights'."""
        path = store.path / FILE
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise StoreError(f"{path} cannot be read: {reason(error)}") from error
        found = cls._parsed(path, data)
        sizes = tuple(len(hits) - 1 for hits in found.hits)
        if found.store != store.identity or sizes != store.layout.units:
            raise StoreError(f"{path} is of other weights: record it again")
        return found

    @classmethod
    def _parsed(cls, path: Path, data: Any) -> Needs:
        try:
            hits = tuple(tuple(int(one) for one in layer) for layer in data["hits"])
            return cls(str(data["store"]), int(data["wanted"]), hits)
        except (KeyError, TypeError, ValueError) as error:
            raise StoreError(f"{path} is damaged") from error

    def write(self, store: Store) -> Path:
        """Into the store; the file."""
        path = store.path / FILE
        write_whole(path, json.dumps(asdict(self)).encode())
        return path

    def misses(self, slots: Sequence[int]) -> int:
        """With so many slots in each layer."""
        return self.wanted - sum(hits[count] for hits, count in zip(self.hits, slots, strict=True))

    def instead_of(self, slots: Sequence[int], floors: Sequence[int]) -> list[int]:
        """The same number of slots divided by need, where that is worth it."""
        divided = by_need(self.hits, floors, sum(slots))
        saved = self.misses(slots) - self.misses(divided)
        return divided if saved > WORTH * self.misses(slots) else list(slots)


def by_need(hits: Sequence[Sequence[int]], floors: Sequence[int], total: int) -> list[int]:
    """`total` slots divided so that another one would bring about as many hits in every layer.

    `hits` are each layer's by its slots; no layer has fewer than its floor.
    """
    gains = [
        (-gain, layer)
        for layer, (row, floor) in enumerate(zip(hits, floors, strict=True))
        for gain in _falling(row[floor:])
    ]
    slots = list(floors)
    for _, layer in sorted(gains)[: total - sum(floors)]:
        slots[layer] += 1
    return slots


def _falling(hits: Sequence[int]) -> list[float]:
    """What each further slot brings, made to fall: a later step that is steeper is shared."""
    gains: list[tuple[float, int]] = []  # mean gain, and of how many slots
    for before, after in itertools.pairwise(hits):
        mean, count = float(after - before), 1
        while gains and gains[-1][0] < mean:
            earlier, several = gains.pop()
            mean = (earlier * several + mean * count) / (several + count)
            count += several
        gains.append((mean, count))
    return [mean for mean, count in gains for _ in range(count)]
