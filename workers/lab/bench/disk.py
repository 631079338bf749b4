"""What this disk delivers: request size × readers × depth, by the prefetcher's own code."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

from storage.manifest import BUNDLES
from storage.store import Store
from workers.lab.bench import children
from workers.lab.bench.children import ChildFailed

SIZES = (4 << 10, 16 << 10, 32 << 10, 64 << 10, 256 << 10, 1 << 20)  # bytes
READERS = (1, 2, 4)
DEPTHS = (1, 8, 32, 128)  # of each reader
QUICK = ((16 << 10,), (1, 2), (8,))
CEILING_DEPTHS = ((1, 32), (1, 128), (2, 64), (2, 128), (4, 128))  # readers, depth
SECONDS_OF_READING = 0.7  # of one try, about
ASSUMED_RATE = 1e9  # bytes a second, to choose how many reads that is
LEAST_READS, MOST_READS = 200, 40_000


@dataclass(frozen=True, slots=True)
class Throughput:
    """One try."""

    request_bytes: int
    readers: int
    depth: int
    bytes_per_second: float
    cpu_us_per_read: float
    loaded: bool = False  # while the kernels ran
    sequential: bool = False
    program: str = "prefetcher"  # or fio

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def try_once(
    path: Path,
    request: int,
    readers: int,
    depth: int,
    *,
    quick: bool = False,
    loaded: bool = False,
    sequential: bool = False,
    buffers: int = 0,
) -> Throughput:
    """Read for about a second. Raises ChildFailed."""
    reads = round(SECONDS_OF_READING * ASSUMED_RATE / request)
    reads = LEAST_READS if quick else max(LEAST_READS, min(MOST_READS, reads))
    line = [str(path), "--bytes", str(request), "--readers", str(readers), "--depth", str(depth)]
    line += ["--count", str(reads), "--buffers", str(buffers), *(["--sequential"] if sequential else [])]
    found = children.run_module("workers.lab.bench.reads", line).result
    rate, cpu = found["bytes_per_second"], found["cpu_us_per_read"]
    return Throughput(request, readers, depth, rate, cpu, loaded, sequential)


def sweep(store: Store, *, quick: bool) -> Iterator[Throughput]:
    """Every combination that the file is large enough for. Raises ChildFailed."""
    sizes, readers, depths = QUICK if quick else (SIZES, READERS, DEPTHS)
    path = store.path / BUNDLES
    for request, number, depth in product(sizes, readers, depths):
        if request <= store.layout.total_bytes:
            yield try_once(path, request, number, depth, quick=quick)


def ceiling(
    store: Store,
    request: int,
    *,
    quick: bool,
    dtype: str | None = None,
    threads: int = 0,
    sequential: bool = False,
) -> Throughput:
    """The most that any number of readers and depth brings at this size.

    With `dtype`, while its kernels run with `threads`. Raises ChildFailed where nothing could be read.
    """
    path = store.path / BUNDLES
    tries = CEILING_DEPTHS[:1] if quick else CEILING_DEPTHS

    def best() -> Throughput:
        found = []
        for readers, depth in tries:
            try:
                found.append(
                    try_once(
                        path, request, readers, depth,
                        quick=quick, loaded=dtype is not None, sequential=sequential,
                    )
                )  # fmt: skip
            except ChildFailed as error:
                reason = error
        if not found:
            raise ChildFailed(f"the disk could not be measured: {reason}")
        return max(found, key=lambda one: one.bytes_per_second)

    if dtype is None:
        return best()
    with children.load(dtype, threads):
        return best()


FIO_DEPTHS = ((1, 128), (2, 64))  # readers, depth
FIO_ROUNDS = 3
FIO_SECONDS = 2


def beside_fio(store: Store, request: int) -> list[Throughput]:
    """The prefetcher and fio in turn, random direct reads of one size; nothing where fio is not installed.

    Both fill as many buffers as they have reads in flight. Those stay in the processor's cache, and reads
    into it are up to a tenth quicker than into a ring's slots.

    Raises ChildFailed, such as for a file system or a kernel on which fio cannot read so.
    """
    path = store.path / BUNDLES
    if shutil.which("fio") is None:
        return []
    found = []
    for (readers, depth), _ in product(FIO_DEPTHS, range(FIO_ROUNDS)):
        found.append(try_once(path, request, readers, depth, buffers=readers * depth))
        found.append(_fio(path, request, readers, depth))
    return found


def _fio(path: Path, request: int, jobs: int, depth: int) -> Throughput:
    """Raises ChildFailed."""
    options = {
        "name": "random", "filename": path, "rw": "randread", "bs": request, "direct": 1,
        "ioengine": "io_uring", "iodepth": depth, "numjobs": jobs, "runtime": FIO_SECONDS,
        "output-format": "json",
    }  # fmt: skip
    line = ["fio", *(f"--{key}={value}" for key, value in options.items())]
    ran = children.run([*line, "--time_based", "--readonly", "--group_reporting"])
    job = ran.result["jobs"][0]
    cpu = (job["usr_cpu"] + job["sys_cpu"]) / 100 * jobs  # shares of each job's time
    read = job["read"]
    return Throughput(
        request, jobs, depth, float(read["bw_bytes"]), 1e6 * cpu / max(1.0, read["iops"]), program="fio"
    )
