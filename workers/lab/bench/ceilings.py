"""The most that the disk gives at a row's request size, before and after each of its runs.

A shared disk changes within minutes, so a run is held against the ceilings around it.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field

from pipeline.ring.plan import HOST
from workers.lab.bench import disk
from workers.lab.bench.job import BenchJob
from workers.lab.bench.series import Series

SEQUENTIAL = 8 << 20  # bytes of one read of the naive baseline, and of its ceiling
PAGE = 4096  # bytes; direct reads begin and end at multiples


@dataclass(frozen=True, slots=True)
class Ceilings:
    """Bytes a second: of the idle disk, and while the kernels run in another process."""

    request_bytes: int
    idle: float
    loaded: float

    def between(self, other: Ceilings) -> Ceilings:
        """What both together took for as many bytes each."""
        return Ceilings(
            other.request_bytes,
            statistics.harmonic_mean((self.idle, other.idle)),
            statistics.harmonic_mean((self.loaded, other.loaded)),
        )


@dataclass(slots=True)
class Around:
    """Ceilings around runs: those after one run are those before the next at the same request size."""

    job: BenchJob
    _fresh: dict[tuple[int, bool], Ceilings] = field(default_factory=dict)

    def now(self, series: Series) -> Ceilings:
        """At the request size of the row's last run; before the first, a bundle's. Raises ChildFailed."""
        request = _request(self.job, series)
        key = request, series.streams
        if key not in self._fresh:
            busy = self.job.dtype if self.job.device in HOST else None  # a GPU leaves the cores idle
            idle, loaded = (
                disk.ceiling(
                    self.job.store,
                    request,
                    quick=self.job.quick,
                    dtype=dtype,
                    threads=self.job.threads,
                    sequential=series.streams,
                ).bytes_per_second
                for dtype in (None, busy)
            )
            self._fresh[key] = Ceilings(request, idle, loaded)
        return self._fresh[key]

    def ran(self) -> None:
        """Something has run since."""
        self._fresh.clear()


def _request(job: BenchJob, series: Series) -> int:
    """Bytes of one read: a whole number of bundles, or a piece of one, or long reads where a row streams."""
    if series.streams:
        return min(SEQUENTIAL, max(layer.bytes for layer in job.store.layout.layers))
    stride, most = job.store.layout.stride, job.resolved().prefetcher.max_read
    mean = series.row(series.runs).request_bytes if series.runs else 0.0
    if stride > most:
        pieces = -(-stride // most)
        return round((mean or stride / pieces) / PAGE) * PAGE
    return max(stride, round(mean / stride) * stride)
