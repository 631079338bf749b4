"""Drafts by a smaller model with the same tokens, all of it in memory.

It reads what the text has gained since it was last asked, and writes on by the draws that the text itself
will be chosen by: where both models see about the same probabilities, they choose the same tokens.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from pipeline.planner.drafting import PIECE
from pipeline.ring.plan import STEP_ROWS
from pipeline.ring.sampling import Sampling
from storage.codecs import F32, Codec
from storage.store import Store
from workers.compute.blocks import run
from workers.compute.cpu.device import CpuDevice
from workers.compute.sampling import choose
from workers.compute.weights import Weights
from workers.routing import Ids


class ModelDrafts:
    """`source.Source` over a model. Close it after use."""

    def __init__(self, store: Store, vocabulary: int, context: int, threads: int, cache_codec: Codec) -> None:
        """`vocabulary`: token ids that the other model knows; `context` in tokens."""
        weights = Weights(store)
        self._architecture = store.architecture
        self._context = min(context, store.architecture.max_positions)
        self._vocabulary = vocabulary
        self._device = CpuDevice(weights, self._context, threads, cache_codec)
        self._units = [store.read_layer(index) for index in range(len(store.layout.layers))]
        self._ids = [np.arange(len(units), dtype=np.int32) for units in self._units]
        self._held: list[int] = []  # tokens whose keys and values are there
        self._sampling = Sampling()

    def begin(self, prompt: Sequence[int], sampling: Sampling) -> None:
        self._sampling = sampling

    def trust(self, text: Sequence[int]) -> int:
        """The same everywhere within the model's own context."""
        return STEP_ROWS - 1 if len(text) + STEP_ROWS <= self._context else 0

    def draft(self, text: Sequence[int], count: int, index: int) -> list[int]:
        same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(self._held, text[:-1], strict=False))
        del self._held[sum(1 for _ in same) :]
        logits = self._read(text[len(self._held) :])
        found: list[int] = []
        while True:
            found.append(choose(logits[: self._vocabulary], self._sampling, index + len(found)))
            if len(found) == count:
                return found
            logits = self._read(found[-1:])

    def _read(self, tokens: Sequence[int]) -> F32:
        """Logits [vocabulary] behind more tokens, at least one."""
        x: Any = None
        for start in range(0, len(tokens), PIECE):
            some = tokens[start : start + PIECE]
            self._device.begin(len(self._held), len(some), every=len(some) > 1)
            x = run(self._architecture, self._device, self._device.embed(np.array(some)), self)
            self._held += some
        logits: F32 = self._device.logits(x[-1:])[0]
        return logits

    # -- blocks.Units, all of which are there -----------------------------------------------------

    def announce(self, index: int, hidden: Any) -> None:
        """Nobody has to know."""

    def routed(self, index: int, ids: Ids) -> None:
        """Nobody has to know."""

    def ffn(self, index: int, ffn_input: Any) -> Any:
        ffn = self._device.ffn(index, ffn_input)
        ffn.add(self._ids[index], self._ids[index], self._units[index])
        ffn.close()
        return ffn.finish()

    def close(self) -> None:
        self._device.close()
