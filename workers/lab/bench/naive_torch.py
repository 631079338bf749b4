"""The baseline on a torch device: every matrix and unit goes over the bus for every token, as it is read."""

from __future__ import annotations

import mmap
import time
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from pipeline.console import say
from storage.architecture import PROJECT_IN
from storage.codecs import F32, FLOAT32
from storage.layout import Rows
from workers.compute import bound
from workers.compute.bound import Source
from workers.compute.torch.device import TorchDevice
from workers.compute.torch.making import device_of
from workers.compute.torch.pages import lock
from workers.compute.torch.weights import Matrix, Placed
from workers.compute.torch.widening import stored, widened
from workers.compute.weights import Vectors
from workers.lab.bench.stream import Stream


def lock_pages(buffer: mmap.mmap) -> None:
    """Let CUDA copy from these pages without a copy of its own; where it cannot, that is said."""
    if problem := lock(np.frombuffer(buffer, np.uint8)):
        say(problem)


@dataclass(slots=True)
class _Bus:
    """What has gone over, and how long the host waited for it."""

    bytes: int = 0
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class _FromStream(Matrix):
    """A matrix of which nothing is kept."""

    name: str = ""
    vectors: Vectors | None = None
    stream: Stream | None = None
    bus: _Bus | None = None

    def __call__(self, x: Tensor) -> Tensor:
        assert self.vectors is not None
        assert self.stream is not None
        if self.name == PROJECT_IN:  # before the token's stream begins
            products = [functional.linear(x, self._over(self.vectors.read(self.name)))]
        else:
            products, lines = [], self.vectors.file.place(self.name).shape[0]
            while sum(product.shape[1] for product in products) < lines:
                for piece, read in self.stream.take():
                    if piece.name != self.name:
                        raise RuntimeError(f"{piece.name} came where {self.name} was expected")
                    rows = Rows.of_matrix(read.view(self.codec.carrier), self.codec)
                    products.append(functional.linear(x, self._over(rows)))
        product = torch.cat(products, dim=1)
        return product if self.bias is None else product + self.bias

    def _over(self, rows: Rows) -> Tensor:
        assert self.bus is not None
        started = time.perf_counter()
        values = stored(rows, self.weight.device)
        self.bus.bytes += values.nbytes
        self.bus.seconds += time.perf_counter() - started
        return widened(values, self.codec)

    def lines(self, which: Tensor | slice) -> Tensor:
        assert self.vectors is not None
        wanted = which if isinstance(which, slice) else which.cpu().numpy()
        return torch.from_numpy(self.vectors.lines(self.name, wanted)).to(self.weight.device)


class _Streamed(Placed):
    """A model's vectors on a device, and none of its matrices."""

    def __init__(self, vectors: Vectors, where: torch.device, stream: Stream, bus: _Bus) -> None:
        self._vectors, self._stream, self._bus = vectors, stream, bus
        super().__init__(vectors, where)

    def matrix(self, linear: bound.Linear) -> Matrix:
        bias = self.vector(linear.bias) if linear.bias.size else None
        weight = linear.weight
        nothing = torch.zeros(0, device=self.where)
        return _FromStream(
            nothing, weight.codec, weight.width, bias, linear.name, self._vectors, self._stream, self._bus
        )


class StreamedTorch(TorchDevice):
    """A torch device, one token at a time, with every matrix out of a stream."""

    def __init__(self, vectors: Vectors, context: int, threads: int, stream: Stream, kind: str) -> None:
        torch.set_num_threads(threads)
        self._bus, self._stream = _Bus(), stream
        super().__init__(vectors, context, FLOAT32, device_of(kind))

    def place(self, source: Source, where: torch.device) -> Placed:
        assert isinstance(source, Vectors)
        return _Streamed(source, where, self._stream, self._bus)

    def remember(self) -> None:
        """Put random keys and values in the cache."""
        random = torch.Generator(self.kept[0][0].device).manual_seed(0)
        for pair in self.kept:
            for one in pair:
                one.normal_(generator=random)

    def router_logits(self, linear: bound.Linear, x: Tensor) -> F32:
        """A router comes out of the stream, too."""
        return self.host(self.placed.matrix(linear)(x))

    def counters(self) -> dict[str, float]:
        found = super().counters()
        for name, value in (("bus_bytes", self._bus.bytes), ("transfer_seconds", self._bus.seconds)):
            found[f"decode_{name}"] = found.get(f"decode_{name}", 0.0) + value
        return found
