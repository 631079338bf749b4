"""What this machine's memory delivers: to a plain read, and to the kernels."""

from __future__ import annotations

from workers import kernels  # isort: skip  # before torch, for OpenMP's settings

import math
import mmap
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

import numba
import numpy as np
from numba import njit, prange

from storage.codecs import CODECS, F32, FLOAT16, Carrier, narrow
from storage.layout import Rows

WIDTH = 4096  # elements of a row, as the largest models' hidden states
SIZE: Final = 256 << 20  # bytes of a matrix: more than a processor's cache keeps
ROUNDS: Final = 6
SMALL: Final = 1 << 19  # bytes of a launch that is nearly nothing but a launch
LAUNCHES: Final = 100
REST: Final = 0.0003  # seconds before each: a layer's launches come when cores have had a rest
PROMPT: Final = 128  # tokens of a product for prompts
LINES, PRODUCTS = 512, 12  # rows of one, and how many
RANK, MAPS = 96, 24  # of predictors: more maps than a core's cache keeps


@njit(parallel=True, fastmath={"reassoc", "contract"}, cache=True, nogil=True)
def _sum(words: Any, pieces: Any, out: Any) -> None:
    """Sums of equal pieces of words: one load and one addition each, the least that a read can do."""
    step = words.shape[0] // pieces
    for piece in prange(pieces):
        part = words[piece * step : (piece + 1) * step]
        total = np.float32(0)
        for j in range(part.shape[0]):
            total += part[j]
        out[piece] = total


def read_rate(words: F32, threads: int) -> float:
    """Bytes a second of one plain read of all words."""
    out = np.zeros(threads, np.float32)
    numba.set_num_threads(threads)
    started = time.perf_counter()
    _sum(words, threads, out)
    return words.nbytes / (time.perf_counter() - started)


def best_rate(work: Callable[[], object], size: int, seconds: float) -> float:
    """`size` a second: the best of several rounds: what disturbs one is not the memory."""
    work()
    best, ends = 0.0, time.perf_counter() + seconds
    while time.perf_counter() < ends:
        started = time.perf_counter()
        work()
        best = max(best, size / (time.perf_counter() - started))
    return best


def matrix_of(size: int, dtype: str) -> Carrier:
    """A matrix of about `size` bytes in `dtype`, with rows of WIDTH values."""
    row = np.random.default_rng(0).standard_normal(WIDTH, np.float32)  # no denormals: those are slow
    return np.tile(narrow(row, dtype), (size // CODECS[dtype].size(WIDTH), 1))


def plain(threads: int) -> float:
    """Bytes a second of a plain read."""
    words = np.ones(SIZE // 4, np.float32)
    read_rate(words, threads)
    return sorted(read_rate(words, threads) for _ in range(ROUNDS))[-2]


def products(name: str, threads: int) -> dict[str, float]:
    """Bytes a second in the codec `name`: of a whole matrix's product, and of scattered rows' dots and sums.

    Rows lie in shared memory, as slots do: its pages are small, and that is slower.
    """
    codec = CODECS[name]
    weights = matrix_of(SIZE, name)
    matrix, lines = Rows.of_matrix(weights, codec), weights.shape[0]
    x, y = np.ones(WIDTH, np.float32), np.empty(lines, np.float32)
    found = {"product": _usual(lambda: kernels.matvec(matrix, x, threads, out=y), weights.nbytes)}
    ids = np.arange(0, lines, 2, dtype=np.int32)
    a, total, some = np.ones(ids.size, np.float32), np.zeros(WIDTH, np.float32), y[: ids.size]
    slots = np.frombuffer(mmap.mmap(-1, weights.nbytes), weights.dtype).reshape(weights.shape)
    slots[:] = weights
    rows, half = Rows.of_matrix(slots, codec), weights.nbytes // 2

    def dots() -> None:
        kernels.activate(rows, ids, ids, x, kernels.NO_BIAS, "relu", threads, some)

    found["dots"] = _usual(dots, half)
    found["sums"] = _usual(lambda: kernels.accumulate(rows, ids, ids, a, total, threads), half)
    return found


def scoring() -> float:
    """Bytes a second of low-rank predictors' maps, by the one thread that they have."""
    shapes = (MAPS, RANK, WIDTH), (MAPS, 4 * WIDTH, RANK)
    down, up = (np.full(shape, 0x3C00, np.uint16) for shape in shapes)
    bias, scores = np.zeros(4 * WIDTH, np.float32), np.zeros(4 * WIDTH, np.float32)
    x, ids = np.ones(WIDTH, np.float32), np.empty(4 * WIDTH, np.intp)

    def score() -> None:
        for layer in range(MAPS):
            kernels.score(FLOAT16, down[layer], up[layer], x, np.float32(1), bias, scores)
            kernels.passing(scores, 0.0, math.inf, ids)

    return _usual(score, down.nbytes + up.nbytes)


def launch(threads: int, name: str, rate: float) -> float:
    """Seconds that a launch takes beside its bytes at `rate`."""
    matrix = Rows.of_matrix(matrix_of(SMALL, name), CODECS[name])
    x, y = np.ones(WIDTH, np.float32), np.empty(matrix.memory.shape[0], np.float32)
    found = []
    for _ in range(LAUNCHES):
        time.sleep(REST)
        started = time.perf_counter()
        kernels.matvec(matrix, x, threads, out=y)
        found.append(time.perf_counter() - started)
    return max(0.0, statistics.median(found) - SMALL / rate)


def arithmetic(threads: int) -> float:
    """FLOP a second of a prompt's products, each thread with rows of its own, as compute does them."""
    rows = Rows.of_matrix(matrix_of(LINES * FLOAT16.size(WIDTH), FLOAT16.name), FLOAT16)
    which, x = np.arange(LINES), kernels.in_panels(np.ones((PROMPT, WIDTH), np.float32))

    def some(_: int) -> None:
        for _ in range(PRODUCTS):
            kernels.multiply(rows, which, x, kernels.new_panels(PROMPT, LINES))

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(some, range(threads)))
        started = time.perf_counter()
        list(pool.map(some, range(threads)))
        seconds = time.perf_counter() - started
    return 2.0 * LINES * WIDTH * PROMPT * PRODUCTS * threads / seconds


def _usual(work: Callable[[], object], size: int) -> float:
    """`size` a second, of the second best of some rounds behind a first one: others disturb most of them."""
    work()
    found = []
    for _ in range(ROUNDS):
        started = time.perf_counter()
        work()
        found.append(time.perf_counter() - started)
    return size / sorted(found)[1]
