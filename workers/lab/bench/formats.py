"""`python -m workers.lab.bench.formats`: kernels of the number formats beside a plain read of the memory.

Of each format some hundred MB of rows are multiplied with a vector: as a matrix, row after row, and as units
that lie scattered over slots, by their up rows and then by sums of their down rows. Rates are bytes of codes
and scales a second. A plain read is measured in every round, since the machine's rate changes.
"""

from __future__ import annotations

from workers import kernels  # isort: skip  # before torch, for OpenMP's settings

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import numba
import numpy as np

from pipeline.cores import thread_count
from storage.codecs import CODECS, Codec
from storage.layout import Rows
from workers.probe.memory import read_rate

WIDTH = 4096  # values of a row
FORMATS = ("float16", "q8", "q8g128", "q4", "q4g128", "q4s")
_SEED = 0


@dataclass(frozen=True, slots=True)
class Rates:
    """Of one format: bytes a second, and the shares of a plain read's in the same rounds; medians."""

    read: float
    rows: float
    rows_share: float
    units: float  # scattered: dot products, then sums
    units_share: float


def measure(codec: Codec, size: int, threads: int, rounds: int) -> Rates:
    """Rates of about `size` bytes in `codec`, alternately with those of a plain read."""
    random = np.random.default_rng(_SEED)
    row, line = codec.elements(WIDTH), codec.elements(2 * WIDTH)
    few = random.standard_normal((64, 2 * WIDTH), np.float32)  # no denormals: those are slow
    halves = [codec.narrow(few[:, start : start + WIDTH]) for start in (0, WIDTH)]
    count = size // codec.size(2 * WIDTH)
    memory = np.tile(np.concatenate(halves, axis=1), (-(-count // 64), 1))[:count]
    up, down = (Rows(memory, codec, start, WIDTH) for start in (0, row))
    matrix = Rows.of_matrix(memory.reshape(-1, row), codec)
    x, out = random.standard_normal(WIDTH, np.float32), np.empty(2 * count, np.float32)
    ids, slots = np.arange(count, dtype=np.int32), random.permutation(count).astype(np.int32)
    a, y = np.empty(count, np.float32), np.zeros(WIDTH, np.float32)
    assert memory.shape == (count, line)

    def units() -> None:
        kernels.activate(up, ids, slots, x, kernels.NO_BIAS, "gelu", threads, a)
        kernels.accumulate(down, ids, slots, a, y, threads)

    def rows() -> None:
        kernels.matvec(matrix, x, threads, out=out)

    words = memory.reshape(-1).view(np.uint8)[: memory.nbytes // 8 * 8].view(np.float32)
    found: dict[str, list[float]] = {"read": [], "rows": [], "units": []}
    for work in (rows, units, lambda: read_rate(words, threads)):  # compiled once before
        work()
    for _ in range(rounds):
        found["read"].append(read_rate(words, threads))
        found["rows"].append(memory.nbytes / _seconds(rows))
        found["units"].append(memory.nbytes / _seconds(units))
    read = found["read"]
    return Rates(
        read=statistics.median(read),
        rows=statistics.median(found["rows"]),
        rows_share=statistics.median(np.divide(found["rows"], read).tolist()),
        units=statistics.median(found["units"]),
        units_share=statistics.median(np.divide(found["units"], read).tolist()),
    )


def _seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m workers.lab.bench.formats", description=__doc__)
    parser.add_argument("--bytes", type=int, default=400 << 20, help="of each format's rows")
    parser.add_argument("--threads", type=int, default=0, help="0: as many as there are CPUs")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--formats", nargs="+", default=FORMATS, choices=tuple(CODECS), metavar="NAME")
    given = parser.parse_args()
    threads = thread_count(given.threads)
    numba.set_num_threads(threads)
    for name in given.formats:
        found = measure(CODECS[name], given.bytes, threads, given.rounds)
        print(json.dumps({"format": name, "threads": threads, **asdict(found)}), flush=True)


if __name__ == "__main__":
    main()
