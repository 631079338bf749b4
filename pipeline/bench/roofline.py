"""How close a row comes to what disk and memory allow."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from safetensors import safe_open

from pipeline import planner
from pipeline.bench import children, disk
from pipeline.bench.disk import Throughput
from pipeline.bench.job import Job
from pipeline.bench.rows import NAIVE, Row
from pipeline.config import Config
from storage.format import ITEMSIZE, RESIDENT, Store

SEQUENTIAL = 8 << 20  # bytes of one read of the naive baseline, and of its ceiling


@dataclass(frozen=True, slots=True)
class Roofline:
    """One row against its roof. Times are milliseconds a token."""

    row: str
    request_bytes: int
    disk_idle: float  # bytes a second, at that request size
    disk_loaded: float  # while the kernels run
    memory: float  # bytes a second
    flash_bytes: float  # read a token
    memory_bytes: float  # resident weights, predictors and FFN rows that a token touches
    total_ms: float  # achieved

    @property
    def flash_ms(self) -> float:
        return 1e3 * self.flash_bytes / self.disk_loaded

    @property
    def flash_idle_ms(self) -> float:
        return 1e3 * self.flash_bytes / self.disk_idle

    @property
    def memory_ms(self) -> float:
        return 1e3 * self.memory_bytes / self.memory

    @property
    def bound(self) -> str:
        return "flash" if self.flash_ms >= self.memory_ms else "memory"

    @property
    def ratio(self) -> float:
        """Achieved ÷ the larger of the two, the disk's ceiling taken while the kernels run."""
        roof = max(self.flash_ms, self.memory_ms)
        return self.total_ms / roof if roof else 0.0

    @property
    def ratio_idle(self) -> float:
        """The same with the idle disk's ceiling, which is harder to reach."""
        roof = max(self.flash_idle_ms, self.memory_ms)
        return self.total_ms / roof if roof else 0.0

    def to_json(self) -> dict[str, Any]:
        derived = ("flash_ms", "flash_idle_ms", "memory_ms", "bound", "ratio", "ratio_idle")
        return {**asdict(self), **{name: getattr(self, name) for name in derived}}


def resident_bytes(job: Job) -> int:
    """Resident weights that a token reads: all but the embedding's and positions' other rows."""
    store = job.store
    a = store.architecture
    itemsize = ITEMSIZE[store.layout.dtype]
    total = store.manifest.files[RESIDENT].bytes
    if not a.tied_head:
        total -= a.vocabulary * a.embed_dim * itemsize  # a tied one is the head
    if a.positions == "learned":
        total -= (a.max_positions + a.position_offset) * a.d_model * itemsize
    return max(0, total)


def memory_bytes(job: Job, row: Row) -> float:
    """Bytes that the kernels and the predictor must read of DRAM for one token of `row`."""
    own = job.resolved(row.settings)
    predictors = predictor_bytes(job.store, own) if own.predictor.kind == "lowrank" else 0
    return resident_bytes(job) + predictors + row.touched_bytes


def predictor_bytes(store: Store, config: Config) -> int:
    """Bytes of the maps that one token goes through; a map may use the in-layer one's matrices."""
    ahead = config.predictor.lookahead > 0
    used = [
        prefix
        for prefix, needed in (("layers", ahead), ("inlayer", config.predictor.refine or not ahead))
        if needed
    ]
    total = 0
    with safe_open(store.predictors(config.model.predictor), "numpy") as file:
        known = set(file.keys())
        for prefix, layer, name in itertools.product(used, range(store.layout.layers), ("down", "up")):
            names = [f"{one}.{layer}.{name}" for one in (prefix, "inlayer", "layers")]
            found = next((one for one in names if one in known), None)
            total += math.prod(file.get_slice(found).get_shape()) * 2 if found else 0
    return total


def bandwidth(job: Job) -> dict[str, float]:
    """Rates: bytes a second of `read`ing alone and of the `matvec` kernel, FLOP a second of `matmul`."""
    size = (64 << 20) if job.quick else (1 << 30)
    line = ["--bytes", str(size), "--threads", str(job.threads), "--dtype", job.store.layout.dtype]
    line += ["--seconds", "0.1" if job.quick else "1.0"]
    return {
        name: float(rate)
        for name, rate in children.run_module("workers.compute.bandwidth", line).result.items()
    }


def ceilings(job: Job, row: Row) -> tuple[Throughput, Throughput]:
    """The most that the disk gives at a row's request size: idle, and while the kernels run.

    To be taken right after each of its runs: shared disks change within minutes.
    """
    idle, loaded = (_ceiling(job, row, dtype) for dtype in (None, job.store.layout.dtype))
    return idle, loaded


def _ceiling(job: Job, row: Row, dtype: str | None) -> Throughput:
    if row.name == NAIVE or row.settings.get("predictor.kind") == "all":
        return sequential(job, dtype)
    stride = job.store.layout.stride
    request = max(stride, round(row.request_bytes / stride) * stride)
    return disk.ceiling(job.store, request, quick=job.quick, dtype=dtype)


def measure(job: Job, row: Row, memory: float, rates: Sequence[tuple[Throughput, Throughput]]) -> Roofline:
    """The roof of a row: `memory` in bytes a second, and the median of its `ceilings`, one after each run."""
    naive = row.name == NAIVE
    return Roofline(
        row=row.name,
        request_bytes=rates[0][0].request_bytes,
        disk_idle=statistics.median(idle.bytes_per_second for idle, _ in rates),
        disk_loaded=statistics.median(loaded.bytes_per_second for _, loaded in rates),
        memory=memory,
        flash_bytes=row.bytes_per_token,
        memory_bytes=float(planner.checkpoint_bytes(job.store)) if naive else memory_bytes(job, row),
        total_ms=row.total_ms,
    )


def sequential(job: Job, dtype: str | None = None) -> Throughput:
    """The disk's ceiling of long reads one after another; with `dtype`, under load."""
    request = min(SEQUENTIAL, job.store.layout.layer_bytes)
    return disk.ceiling(job.store, request, quick=job.quick, dtype=dtype, sequential=True)
