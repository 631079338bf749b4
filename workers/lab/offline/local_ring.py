"""A ring in one process: the workers' own predictions, residency and layer loop, without processes or a disk.

For what a ring does not tell: the logits of every token, under sets that hang on what is resident. Each
message is answered at once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from types import TracebackType
from typing import Self

import numpy as np

from pipeline.config import Config
from pipeline.ring import segments
from pipeline.ring.messages import HiddenReady, LayerPart, Message, NeuronsPredicted, PartDone, ReadBundles
from pipeline.ring.plan import Plan
from pipeline.ring.segments import ID, SLOT
from pipeline.ring.timeline import Timeline
from storage.codecs import CODECS, F32
from storage.shadow import Shadow
from storage.store import Store
from workers.cache.layers import Instruction, LayerCache
from workers.cache.policies import make_policy
from workers.compute.blocks import run
from workers.compute.cpu.device import CpuDevice
from workers.compute.cpu.shadow import CpuShadow, read
from workers.compute.device import Bytes
from workers.compute.ring_units import RingUnits
from workers.compute.weights import Weights
from workers.predictor.prediction import Prediction
from workers.predictor.scorers import load_scorer


class LocalRing:
    """Use as a context manager. It is also the channel that its own layer loop speaks to."""

    def __init__(
        self, store: Store, config: Config, plan: Plan, weights: Weights, units: Sequence[Bytes], threads: int
    ) -> None:
        """`store`: with the routers that the ring is to have (`dials.with_fewer`); `units`: all layers'."""
        self._plan, self._units, self._architecture = plan, units, store.architecture
        self._memory = segments.local(plan)
        scorer = load_scorer(store, config, plan.forecast)
        self._prediction = Prediction(plan, scorer, self._memory.hidden, self._memory.predicted)
        self.cache = LayerCache(
            plan,
            self._memory.wanted,
            self._memory.reads,
            lambda layer: make_policy(plan.units[layer], config.cache),
        )
        self._device = CpuDevice(weights, plan.context, threads, CODECS[plan.cache_dtype])
        self._shadow = None
        if plan.forecast.shadowed:
            self._shadow = CpuShadow(weights, read(Shadow.open(store)), plan.forecast, threads)
        self._loop = RingUnits(
            self._device, plan, self._memory, self, None, lambda _: False, Timeline(), self._shadow
        )
        self._parts: deque[LayerPart] = deque()
        self.read = 0  # units that tokens read, also as guesses; not those of prompts

    @property
    def computed(self) -> int:
        """Experts that tokens have had, those of prompts not counted."""
        return int(self._loop.counts["active"])

    def prefill(self, tokens: Sequence[int]) -> F32:
        """A new sequence begins; logits [tokens, vocabulary]."""
        return self._forward(tokens, 0, every=True)

    def step(self, position: int, token: int) -> F32:
        """Logits [vocabulary] after one more token."""
        logits: F32 = self._forward([token], position, every=False)[0]
        return logits

    def _forward(self, tokens: Sequence[int], first: int, every: bool) -> F32:
        self._device.begin(first, len(tokens), every)
        x = self._device.embed(np.array(tokens))
        self._loop.begin(0, first, every, x)
        return self._device.logits(run(self._architecture, self._device, x, self._loop))

    # -- the channel --------------------------------------------------------------------------------

    def send(self, to: str, message: Message) -> None:
        """What compute tells the predictor, or the cache."""
        match message:
            case HiddenReady():
                for prediction in self._prediction.handle(message):
                    self._predicted(prediction)
            case NeuronsPredicted():
                self._predicted(message)
            case PartDone():
                self._follow(self.cache.handle(message))
            case _:
                raise TypeError(f"nobody takes {type(message).__name__} as {to}")

    def receive(self, inbox: str, timeout: float | None = None) -> Message:
        """The next part; it has been read."""
        return self._parts.popleft()

    def _predicted(self, prediction: NeuronsPredicted) -> None:
        ids = self._memory.predicted[prediction.layer, int(prediction.guess), : prediction.listed]
        self._follow(self.cache.handle(prediction, ids))

    def _follow(self, instructions: Sequence[Instruction]) -> None:
        for instruction in instructions:
            if isinstance(instruction, ReadBundles):
                self._read(instruction)
            else:
                self._parts.append(instruction)

    def _read(self, wanted: ReadBundles) -> None:
        table = self._memory.reads[wanted.layer, :, wanted.start : wanted.start + wanted.count]
        self._memory.bundles[table[SLOT]] = self._units[wanted.layer][table[ID]]
        if not wanted.step.every:
            self.read += wanted.count
        part = LayerPart(wanted.run, wanted.step.number, wanted.layer, wanted.part, (), (), staged=False)
        self._parts.append(part)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._device.close()
        if self._shadow is not None:
            self._shadow.close()
