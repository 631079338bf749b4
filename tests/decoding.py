"""The decoder without a ring: all units at hand, prefill by many tokens and decoding by one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.config import Config
from storage.store import Store
from workers.compute.blocks import run
from workers.compute.cpu.device import CpuDevice
from workers.compute.device import Device
from workers.compute.weights import Weights
from workers.routing import Ids


def own_device(weights: Weights, context: int, threads: int = 1) -> Device[Any]:
    """The device that the tests run on (`pytest --device`)."""
    kind = Config().compute.device
    if kind == "cpu":
        return CpuDevice(weights, context, threads)
    from workers.compute.torch.device import TorchDevice
    from workers.compute.torch.making import device_of

    return TorchDevice(weights, context, where=device_of(kind))


class LocalDecoder:
    """Close it after use."""

    def __init__(
        self, store: Store, context: int = 128, threads: int = 1, device: Device[Any] | None = None
    ) -> None:
        """`device` computes in the place of the one that the tests run on."""
        self.weights = Weights(store)
        self.architecture = store.architecture
        self.device = device or own_device(self.weights, context, threads)
        self.units = [store.read_layer(index) for index in range(len(store.layout.layers))]
        self.length = 0

    def announce(self, index: int, hidden: Any) -> None:
        """Nobody listens."""

    def routed(self, index: int, ids: Ids) -> None:
        """Nobody listens."""

    def ffn(self, index: int, ffn_input: Any) -> Any:
        ffn, units = self.device.ffn(index, ffn_input), self.units[index]
        ids = np.arange(units.shape[0], dtype=np.int32)
        ffn.add(ids, ids, units)
        ffn.close()
        return ffn.finish()

    def prefill(self, prompt: Sequence[int]) -> npt.NDArray[np.float32]:
        """Logits of all tokens, [tokens, vocabulary]."""
        self.length = 0
        return self._forward(prompt, every=True)

    def steps(self, tokens: Sequence[int]) -> npt.NDArray[np.float32]:
        """Logits of all tokens, [tokens, vocabulary], decoded one by one from an empty cache."""
        self.length = 0
        return np.stack([self.step(token) for token in tokens])

    def step(self, token: int) -> npt.NDArray[np.float32]:
        """Logits after one more token."""
        return self._forward([token], every=False)[0]

    def _forward(self, tokens: Sequence[int], every: bool) -> npt.NDArray[np.float32]:
        self.device.begin(self.length, len(tokens), every)
        x = run(self.architecture, self.device, self.device.embed(np.array(tokens)), self)
        self.length += len(tokens)
        return self.device.logits(x)

    def close(self) -> None:
        self.device.close()

    def __enter__(self) -> LocalDecoder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
