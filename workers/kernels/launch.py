"""How threads share the work of a kernel.

A launch goes through stages, and each stage is cut into chunks. Threads take chunks as they come: the cores
are shared with the other workers, and a thread that gets less of its core must not keep the others waiting.
Before a stage that reads what the one before has written, a thread waits until all of that one's chunks are
done. So one launch can do what would take several, each of which costs as much as some hundred kilobytes of
weights; and a single thread goes through the same stages without ever waiting.
"""

from __future__ import annotations

import platform
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import njit, prange, types
from numba.core import config
from numba.core.types import ExternalFunction
from numba.extending import intrinsic
from numba.np.ufunc import threading_layer

# Reassociation and contraction only: nothing is assumed about NaN, infinity or signed zero.
FAST = {"reassoc", "contract"}
SMALL = 1 << 18  # bytes of weights below which a second thread costs more than it saves
CHUNK = 32  # rows that a thread takes at a time, a multiple of four
_AHEAD = 4096  # bytes of rows that are asked for before they are used
_PATIENCE = 2000  # looks at a stage's progress before the core is offered to others

_TAKEN, _DONE = 0, 1  # columns of a launch's progress
_yield = ExternalFunction("sched_yield", types.int32())
_X86 = platform.machine() in ("x86_64", "AMD64")


@njit
def stages(count: Any) -> Any:
    """The progress of a launch: of each stage, how many chunks have been taken, and how many are done."""
    return np.zeros((count, 2), np.int64)


@intrinsic
def _add(typing_context: Any, progress: Any, place: Any) -> Any:
    """Add one to a number that all threads see; returns what it was. What this thread has written before
    is seen by whoever finds the sum."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        array = context.make_array(signature.args[0])(context, builder, args[0])
        one = ir.Constant(ir.IntType(64), 1)
        return builder.atomic_rmw("add", builder.gep(array.data, [args[1]]), one, "acq_rel")

    return types.int64(progress, types.int64), generate


@intrinsic
def _look(typing_context: Any, progress: Any, place: Any) -> Any:
    """A number that all threads see, after a moment's rest."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        array = context.make_array(signature.args[0])(context, builder, args[0])
        if _X86:
            rest = ir.FunctionType(ir.VoidType(), [])
            builder.call(builder.module.declare_intrinsic("llvm.x86.sse2.pause", (), rest), [])
        return builder.load_atomic(builder.gep(array.data, [args[1]]), "acquire", 8)

    return types.int64(progress, types.int64), generate


_add_one: Any = _add  # called by compiled code without the typing context
_look_at: Any = _look


@njit(nogil=True)
def take(progress: Any, stage: Any) -> Any:
    """The number of a chunk of this stage, which nobody else gets."""
    return _add_one(progress, 2 * stage + _TAKEN)


@njit(nogil=True)
def tell(progress: Any, stage: Any) -> None:
    """A chunk of this stage is done."""
    _add_one(progress, 2 * stage + _DONE)


@njit(nogil=True)
def wait(progress: Any, stage: Any, chunks: Any) -> None:
    """Wait until so many chunks of this stage are done: all of them have been taken."""
    looks = 0
    while _look_at(progress, 2 * stage + _DONE) < chunks:
        looks += 1
        if looks > _PATIENCE:
            _yield()


@njit(nogil=True)
def chunks_of(rows: Any) -> Any:
    """How many chunks of CHUNK rows."""
    return (rows + CHUNK - 1) // CHUNK


def rows_ahead(row_bytes: int) -> int:
    """How many rows before its turn a row is asked for, a multiple of four.

    Of short rows more than the next four: a core must have some kilobytes under way to fetch them as fast as
    it could.
    """
    return max(4, -(-_AHEAD // row_bytes) // 4 * 4)


def use_threads(threads: int, weight_bytes: int) -> int:
    """Choose the number of threads for the next launch, at most `threads`; returns it."""
    most: int = config.NUMBA_NUM_THREADS  # type: ignore[attr-defined]
    wanted = 1 if weight_bytes < SMALL else max(1, min(threads, most))
    numba.set_num_threads(wanted)
    return wanted


@njit(parallel=True, cache=True, nogil=True)
def _count(threads: Any) -> Any:
    count = 0
    for _ in prange(threads):
        count += 1
    return count


def start_threads(threads: int) -> int:
    """Start what helps the calling thread, to run where that may now; returns how many work together."""
    numba.set_num_threads(threads)
    started: int = _count(threads)
    return started


def notes() -> str:
    """What the kernels run on, for people."""
    return f"kernels: numba {numba.__version__}, {threading_layer()} threads"
