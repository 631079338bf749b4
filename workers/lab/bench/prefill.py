"""The prompt's time beside its two bounds: one sequential read of the FFN, and its arithmetic."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from storage.codecs import CODECS
from workers.lab.bench import roofline
from workers.lab.bench.job import BenchJob
from workers.lab.bench.rows import Row


@dataclass(frozen=True, slots=True)
class Prefill:
    """One row's prefill. Rates are of a matrix product of the prompt's size."""

    row: str
    tokens: int
    seconds: float
    bytes: float  # of the FFN
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
    a = store.architecture
    codec = CODECS[job.dtype]
    ffn = store.layout.useful_bytes // codec.bytes
    # All resident matrices but the head, which only the last token goes through.
    others = roofline.resident_bytes(job) // codec.bytes - a.vocabulary * a.embed_dim
    return Prefill(
        row=row.name,
        tokens=job.prompt_tokens,
        seconds=row.prefill_seconds,
        bytes=float(store.layout.total_bytes),
        sequential=sequential,
        flop=2.0 * job.prompt_tokens * (ffn + others),
        dtype=job.dtype,
        rate=rates["matmul"],
        rate_float32=rates["matmul_float32"],
    )
