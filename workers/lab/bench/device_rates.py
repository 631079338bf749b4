"""What a torch device delivers: the roof of rows that compute there.

`python -m workers.lab.bench.device_rates --device cuda` prints one JSON object. `read` and `matvec` are bytes
a second of the device's memory, by a sum and by a matrix's product with one vector; `bus` is bytes a second
from page-locked host memory to the device's (of torch-cpu a copy within memory); `matmul` and
`matmul_float32` are FLOP a second of matrix products of a prompt's size, in `--dtype` and in float32.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from pipeline import ending
from pipeline.cores import thread_count
from storage.codecs import FLOAT32, FLOATS
from workers.compute.torch.making import device_of

PROMPT = 128  # tokens
WIDTH = 4096  # values of a row


def measure(kind: str, size: int, threads: int, seconds: float, dtype: str) -> dict[str, float]:
    """Rates of a configuration's `compute.device`, over `size` bytes."""
    torch.set_num_threads(threads)
    where = device_of(kind)
    rate = _Rate(where, seconds)
    weights = torch.ones(size // 4 // WIDTH, WIDTH, device=where)
    x = torch.ones(1, WIDTH, device=where)
    host = torch.ones(size, dtype=torch.uint8, pin_memory=where.type == "cuda")
    there = torch.empty(size, dtype=torch.uint8, device=where)
    found = {
        "read": rate.of(weights.sum, weights.nbytes),
        "matvec": rate.of(lambda: functional.linear(x, weights), weights.nbytes),
        "bus": rate.of(lambda: there.copy_(host, non_blocking=where.type == "cuda"), size),
    }
    found["matmul"] = _products(rate, where, dtype if dtype in FLOATS else FLOAT32.name)
    found["matmul_float32"] = _products(rate, where, FLOAT32.name)
    return found


class _Rate:
    """Times work on a device, to its end there."""

    def __init__(self, where: torch.device, seconds: float) -> None:
        self._kind, self._seconds = where.type, seconds

    def of(self, work: Callable[[], Tensor], size: int) -> float:
        """`size` a second: the best of several rounds, for what disturbs one is not the device."""
        self._once(work)
        best, ends = 0.0, time.perf_counter() + self._seconds
        while not best or time.perf_counter() < ends:
            best = max(best, size / self._once(work))
        return best

    def _once(self, work: Callable[[], Tensor]) -> float:
        started = time.perf_counter()
        work()
        if self._kind == "cuda":
            torch.cuda.synchronize()
        elif self._kind == "mps":
            torch.mps.synchronize()
        return time.perf_counter() - started


def _products(rate: _Rate, where: torch.device, dtype: str) -> float:
    kind = getattr(torch, dtype)
    x = torch.randn(PROMPT, WIDTH, device=where).to(kind)
    weights = torch.randn(WIDTH, WIDTH, device=where).to(kind)
    return rate.of(lambda: functional.linear(x, weights), 2 * PROMPT * WIDTH * WIDTH)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m workers.lab.bench.device_rates", description=__doc__)
    parser.add_argument("--device", default="torch-cpu", help="as a configuration's compute.device")
    parser.add_argument("--bytes", type=int, default=1 << 30)
    parser.add_argument("--threads", type=int, default=0, help="0: as many as there are CPUs")
    parser.add_argument("--seconds", type=float, default=1.0, help="of each measurement")
    parser.add_argument("--dtype", default="float16")
    given = parser.parse_args()
    threads = thread_count(given.threads)
    print(json.dumps(measure(given.device, given.bytes, threads, given.seconds, given.dtype)))


if __name__ == "__main__":
    sys.exit(ending.exit_status(main))
