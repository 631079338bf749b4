"""The prompt's time beside its two bounds: one sequential read of the FFN, and its arithmetic.

Of a mixture, one read of the experts that the prompt read, and each token's own experts.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from storage.architecture import EMBED, HEAD, POSITIONS, Ffn
from storage.codecs import CODECS
from storage.manifest import RESIDENT
from storage.store import Store
from storage.tensors import Tensors
from workers.lab.bench.job import BenchJob
from workers.lab.bench.rows import Row


@dataclass(frozen=True, slots=True)
class Prefill:
    """One row's prefill. Rates are of a matrix product of the prompt's size."""

    row: str
    tokens: int
    seconds: float
    bytes: float  # of the FFN, or of the experts that were read
    sequential: float  # bytes a second
    flop: float
    dtype: str
    rate: float  # FLOP a second in the model's dtype
    rate_float32: float  # and in float32, which the prefill computes in

    @property
    def read_seconds(self) -> float:
        return self.bytes / self.sequential

    @property
    def ratio(self) -> float:
        """Achieved ÷ the larger of reading and computing in the model's dtype."""
        return self.seconds / max(self.read_seconds, self.flop / self.rate)

    @property
    def ratio_float32(self) -> float:
        """The same with float32's rate, which is harder to reach where the CPU has no 16-bit products."""
        return self.seconds / max(self.read_seconds, self.flop / self.rate_float32)

    def to_json(self) -> dict[str, Any]:
        derived = ("read_seconds", "ratio", "ratio_float32")
        return {**asdict(self), **{name: getattr(self, name) for name in derived}}


def measure(job: BenchJob, row: Row, sequential: float, rates: dict[str, float]) -> Prefill:
    """`rates` are those of `roofline.bandwidth`."""
    store = job.store
    return Prefill(
        row=row.name,
        tokens=job.prompt_tokens,
        seconds=row.prefill_seconds,
        bytes=row.prefill_bytes if job.mixture else float(store.layout.total_bytes),
        sequential=sequential,
        flop=2.0 * job.prompt_tokens * multiplied(store),
        dtype=job.dtype,
        rate=rates["matmul"],
        rate_float32=rates["matmul_float32"],
    )


def multiplied(store: Store) -> int:
    """Weights that each token of a prompt is multiplied with; the head's only the last one is."""
    layers, file = store.architecture.layers, Tensors(store.path / RESIDENT)
    total = sum(_of_flash(layer.ffn) for layer in layers) * store.architecture.d_model
    for name, place in file.places.items():
        if len(place.shape) == 2 and name not in (EMBED, HEAD, POSITIONS):
            codec = CODECS[place.dtype]
            total += place.bytes // codec.bytes * codec.block
    return total


def _of_flash(ffn: Ffn) -> int:
    """Rows of `d_model` weights of a layer's units."""
    units = ffn.router.top_k if ffn.router else ffn.units
    return units * ffn.width * (3 if ffn.kind == "gated" else 2)
