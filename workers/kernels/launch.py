"""How threads share the work of a kernel.

Threads take chunks of a launch as they come: the cores are shared with the other workers, and a thread
that gets less of its core must not keep the others waiting.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import config
from numba.extending import intrinsic
from numba.np.ufunc import threading_layer

# Reassociation and contraction only: nothing is assumed about NaN, infinity or signed zero.
FAST = {"reassoc", "contract"}
SMALL = 1 << 18  # bytes of weights below which a second thread costs more than it saves
CHUNK = 32  # rows that a thread takes at a time, a multiple of four


@intrinsic
def _take(typing_context: Any, counter: Any) -> Any:
    """The value of the array's only element, which is one more afterwards: each goes to one thread."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        array = context.make_array(signature.args[0])(context, builder, args[0])
        return builder.atomic_rmw("add", array.data, ir.Constant(ir.IntType(64), 1), "monotonic")

    return types.int64(counter), generate


next_chunk: Any = _take  # called by compiled code with the counter alone


@njit
def chunk_counter() -> Any:
    """Of the chunks that a launch has given out; for `next_chunk`."""
    counter = np.empty(1, np.int64)
    counter[0] = 0
    return counter


def use_threads(threads: int, weight_bytes: int) -> int:
    """Choose the number of threads for the next launch, at most `threads`; returns it."""
    most: int = config.NUMBA_NUM_THREADS  # type: ignore[attr-defined]
    wanted = 1 if weight_bytes < SMALL else max(1, min(threads, most))
    numba.set_num_threads(wanted)
    return wanted


def notes() -> str:
    """What the kernels run on, for people."""
    return f"kernels: numba {numba.__version__}, {threading_layer()} threads"
