"""How close a row comes to what the disk, the way to a device and the memory that computes from allow."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pipeline.planner.budget import checkpoint_bytes
from pipeline.planner.work import scored_bytes
from pipeline.ring.plan import HOST
from storage.architecture import EMBED, POSITIONS
from storage.manifest import RESIDENT
from storage.shadow import Shadow
from storage.tensors import Tensors
from workers.lab.bench import children
from workers.lab.bench.ceilings import Ceilings
from workers.lab.bench.job import BenchJob
from workers.lab.bench.rows import NAIVE, Row


@dataclass(frozen=True, slots=True)
class Roofline:
    """One row against its roof. Times are milliseconds a token."""

    row: str
    request_bytes: int
    memory: float  # bytes a second, of the device that computes
    flash_bytes: float  # read a token
    memory_bytes: float  # resident weights, predictors and FFN rows that a token touches
    run_ms: tuple[float, ...]  # achieved, each run's median
    ceilings: tuple[Ceilings, ...]  # around each run
    bus: float = 0.0  # bytes a second to a torch device's memory; 0: the kernels compute where the slots are
    bus_bytes: float = 0.0  # that a token brings over it

    @property
    def total_ms(self) -> float:
        return statistics.median(self.run_ms)

    @property
    def disk_idle(self) -> float:
        return statistics.median(one.idle for one in self.ceilings)

    @property
    def disk_loaded(self) -> float:
        return statistics.median(one.loaded for one in self.ceilings)

    @property
    def flash_ms(self) -> float:
        return 1e3 * self.flash_bytes / self.disk_loaded

    @property
    def memory_ms(self) -> float:
        return 1e3 * self.memory_bytes / self.memory

    @property
    def bus_ms(self) -> float:
        return 1e3 * self.bus_bytes / self.bus if self.bus else 0.0

    @property
    def bound(self) -> str:
        terms = {"flash": self.flash_ms, "memory": self.memory_ms, "bus": self.bus_ms}
        return max(terms, key=terms.__getitem__)

    @property
    def ratios(self) -> list[float]:
        """Of each run: achieved ÷ the largest of the three, the disk's ceiling taken beside the kernels."""
        return self._ratios([one.loaded for one in self.ceilings])

    @property
    def ratio(self) -> float:
        return statistics.median(self.ratios)

    @property
    def ratio_idle(self) -> float:
        """The same with the idle disk's ceiling, which is harder to reach."""
        return statistics.median(self._ratios([one.idle for one in self.ceilings]))

    def _ratios(self, rates: Sequence[float]) -> list[float]:
        return [
            achieved / max(1e3 * self.flash_bytes / rate, self.memory_ms, self.bus_ms)
            for achieved, rate in zip(self.run_ms, rates, strict=True)
        ]

    def to_json(self) -> dict[str, Any]:
        derived = (
            "total_ms", "disk_idle", "disk_loaded", "flash_ms", "memory_ms", "bus_ms", "bound", "ratios",
            "ratio", "ratio_idle",
        )  # fmt: skip
        return {**asdict(self), **{name: getattr(self, name) for name in derived}}


def resident_bytes(job: BenchJob) -> int:
    """Resident weights that a token reads: all but the embedding's and positions' other rows."""
    file = Tensors(job.store.path / RESIDENT)
    tables = [POSITIONS, *([] if job.store.architecture.tied_head else [EMBED])]  # a tied one is the head
    others = sum(file.place(name).bytes for name in tables if name in file)
    return job.store.manifest.files[RESIDENT].bytes - others


def memory_bytes(job: BenchJob, row: Row) -> float:
    """Bytes that must be read for one token of `row`, of the memory that computes from.

    That is DRAM for the kernels and the predictor; of a GPU its own, which the predictor does not use. A
    shadow's down rows of neurons that have their full rows are counted as well.
    """
    own = job.resolved(row.settings)
    predictors = 0
    if own.predictor.kind == "lowrank" and job.device in HOST:
        predictors = scored_bytes(job.store, own)
    elif own.predictor.kind == "shadow":
        predictors = Shadow.open(job.store).bytes
    return resident_bytes(job) + predictors + row.touched_bytes


def bandwidth(job: BenchJob) -> dict[str, float]:
    """Rates: bytes a second of `read`ing alone and of the `matvec` kernel, FLOP a second of `matmul`.

    Of another device its own, and of the `bus` to it.
    """
    size = (64 << 20) if job.quick else (1 << 30)
    line = ["--bytes", str(size), "--threads", str(job.threads), "--dtype", job.dtype]
    line += ["--seconds", "0.1" if job.quick else "1.0"]
    module = "workers.lab.bench.bandwidth"
    if job.device != "cpu":
        module = "workers.lab.bench.device_rates"
        line += ["--device", job.device]
    return {name: float(rate) for name, rate in children.run_module(module, line).result.items()}


def measure(job: BenchJob, row: Row, rates: Mapping[str, float], ceilings: Sequence[Ceilings]) -> Roofline:
    """The roof of a row: `rates` as `bandwidth` gives them, and the ceilings around each of its runs."""
    naive = row.name == NAIVE
    return Roofline(
        row=row.name,
        request_bytes=ceilings[-1].request_bytes,
        memory=max(rates["read"], rates["matvec"]),
        flash_bytes=row.bytes_per_token,
        memory_bytes=float(checkpoint_bytes(job.store)) if naive else memory_bytes(job, row),
        run_ms=row.run_ms,
        ceilings=tuple(ceilings),
        bus=rates.get("bus", 0.0),
        bus_bytes=row.bus_bytes,
    )
