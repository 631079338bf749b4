"""What this machine's memory delivers: the kernels' roof, and a load for other measurements.

`python -m workers.lab.bench.bandwidth --threads 2` prints one JSON object; with `--load` it says "ready" and
runs the kernels until its standard input ends.
"""

from __future__ import annotations

from workers import kernels  # isort: skip  # before torch, for OpenMP's settings

import argparse
import json
import os
import sys
import threading

import numpy as np
import torch
from torch.nn import functional

from pipeline.cores import thread_count
from storage.codecs import CODECS, FLOAT32, FLOATS
from storage.layout import Rows
from workers.probe.memory import WIDTH, best_rate, matrix_of, read_rate

PROMPT = 128  # tokens


def measure(size: int, threads: int, seconds: float, dtype: str) -> dict[str, float]:
    """Bytes a second: reading alone, and the product of a matrix of `size` bytes with a vector.

    And FLOP a second of matrix products, in `dtype`, where it is one of floats, and in float32.
    """
    weights = matrix_of(size, dtype)
    words = weights.reshape(-1).view(np.float32)
    x = np.ones(WIDTH, np.float32)
    y = np.empty(weights.shape[0], np.float32)
    kernels.warm(CODECS[dtype])
    matrix = Rows.of_matrix(weights, CODECS[dtype])

    found = {
        "read": best_rate(lambda: read_rate(words, threads), weights.nbytes, seconds),
        "matvec": best_rate(lambda: kernels.matvec(matrix, x, threads, out=y), weights.nbytes, seconds),
    }
    if threads > 1:
        found["read_one_thread"] = best_rate(lambda: read_rate(words, 1), weights.nbytes, seconds)
        one = best_rate(lambda: kernels.matvec(matrix, x, 1, out=y), weights.nbytes, seconds)
        found["matvec_one_thread"] = one
    found["matmul"] = products(threads, seconds, dtype if dtype in FLOATS else FLOAT32.name)
    found["matmul_float32"] = products(threads, seconds, FLOAT32.name)
    return found


def products(threads: int, seconds: float, dtype: str) -> float:
    """FLOP a second of torch's product of PROMPT tokens with a matrix, in `dtype`."""
    torch.set_num_threads(threads)
    kind = getattr(torch, dtype)
    x, weights = torch.randn(PROMPT, WIDTH).to(kind), torch.randn(WIDTH, WIDTH).to(kind)
    return best_rate(lambda: functional.linear(x, weights), 2 * PROMPT * WIDTH * WIDTH, seconds)


def load(size: int, threads: int, dtype: str) -> None:
    """Keep the kernels and the memory busy until standard input ends."""
    weights = matrix_of(size, dtype)
    matrix = Rows.of_matrix(weights, CODECS[dtype])
    x, y = np.ones(WIDTH, np.float32), np.empty(weights.shape[0], np.float32)
    kernels.matvec(matrix, x, threads, out=y)
    ended = threading.Event()

    def watch() -> None:
        while os.read(sys.stdin.fileno(), 1):
            pass
        ended.set()

    threading.Thread(target=watch, daemon=True).start()
    print("ready", flush=True)
    while not ended.is_set():
        kernels.matvec(matrix, x, threads, out=y)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m workers.lab.bench.bandwidth", description=__doc__)
    parser.add_argument("--bytes", type=int, default=1 << 30)
    parser.add_argument("--threads", type=int, default=0, help="0: as many as there are CPUs")
    parser.add_argument("--seconds", type=float, default=1.0, help="of each measurement")
    parser.add_argument("--dtype", default="float16")
    parser.add_argument("--load", action="store_true")
    given = parser.parse_args()
    threads = thread_count(given.threads)
    if given.load:
        load(given.bytes, threads, given.dtype)
    else:
        print(json.dumps(measure(given.bytes, threads, given.seconds, given.dtype)))


if __name__ == "__main__":
    main()
