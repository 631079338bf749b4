"""Products of many rows with many tokens, on one thread: a prompt's.

Tokens stand in panels [panels, values, LANES], where a vector holds one value of LANES of them. A tile of
weights is widened, and stays in the core's cache; a block of results stays in registers while a panel passes
by. Each result is one sum, in the order of the values: no bit of it hangs on the tokens and rows beside it.

Two cores with AVX-512 multiplied an expert of 768 by 2,048 in four bits with 27 tokens at 130 GFLOP/s a
thread; widening it whole for a library's product came to 50, and that product alone, of float32, to 75.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from storage.codecs import F32
from storage.layout import Rows
from workers.kernels.grouped import Arguments, processor
from workers.kernels.instructions import FLOAT, LANES, Instructions, long
from workers.kernels.rows import fetch, loops

# A tile has DEPTH values of LINES results: values of every format that are widened together, 64 KiB wide.
DEPTH, LINES = 256, 64
UNROLLED = 4  # values in one turn of the innermost loop
# Results of a block, and panels: the sums fill the registers, and hide how long one addition takes.
BLOCK, PANELS = (8, 2) if processor().wide else (4, 1)
_CACHE_LINE = 64  # bytes
_EACH = 4 * LANES  # bytes of a panel's values of one kind


class Block(Instructions):
    """A few results of as many tokens as some panels have."""

    def add(
        self, tile: Any, steps: tuple[int, int], lines: int, x: list[Any], out: list[Any], depth: Any
    ) -> None:
        """Each `out` += the tile's `lines` · an x. `steps`: bytes to the next line, and to the next value."""
        b, vector = self.builder, ir.VectorType(FLOAT, LANES)
        of_line, of_value = steps
        sums = [
            [self.variable(self.load(place, long(_EACH * line), vector)) for place in out]
            for line in range(lines)
        ]

        def values(first: Any, count: int) -> None:
            totals = [[b.load(one) for one in some] for some in sums]
            for at in (b.add(first, long(number)) for number in range(count)):
                tokens = [self.load(panel, b.mul(at, long(_EACH)), vector) for panel in x]
                start = b.mul(at, long(of_value))
                for line in range(lines):
                    weight = self.spread(self.load(tile, b.add(start, long(line * of_line)), FLOAT))
                    pairs = zip(totals[line], tokens, strict=True)
                    totals[line] = [self.fma(total, weight, some) for total, some in pairs]
            for some, found in zip(sums, totals, strict=True):
                for place, total in zip(some, found, strict=True):
                    b.store(total, place)

        whole = b.mul(b.sdiv(depth, long(UNROLLED)), long(UNROLLED))
        self.loop(long(0), whole, UNROLLED, lambda at: values(at, UNROLLED))
        self.loop(whole, depth, 1, lambda at: values(at, 1))
        for line, some in enumerate(sums):
            for place, total in zip(out, some, strict=True):
                self.store(b.load(total), place, long(_EACH * line))


def _adder(lines: int, panels: int, steps: tuple[int, int]) -> Any:
    """For compiled code: `Block.add` from these elements of a tile, of x and of out on.

    Panels are `step` elements apart.
    """

    @intrinsic
    def add(
        typing: Any,
        tile: Any,
        tile_at: Any,
        x: Any,
        x_at: Any,
        x_step: Any,
        out: Any,
        out_at: Any,
        out_step: Any,
        depth: Any,
    ) -> Any:
        signature = types.void(tile, tile_at, x, x_at, x_step, out, out_at, out_step, depth)

        def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            given = Arguments(context, builder, signature, values)

            def place(number: int, element: Any) -> Any:
                return builder.gep(given.bytes(number), [builder.mul(element, long(4))])

            def places(number: int) -> list[Any]:
                at, step = values[number + 1], values[number + 2]
                every = (builder.add(at, builder.mul(step, long(panel))) for panel in range(panels))
                return [place(number, element) for element in every]

            Block(builder, processor()).add(
                place(0, values[1]), steps, lines, places(2), places(5), values[8]
            )
            return context.get_dummy_value()

        return signature, generate

    return add


def _adders(steps: tuple[int, int]) -> tuple[Any, Any, Any]:
    return _adder(BLOCK, PANELS, steps), _adder(BLOCK, 1, steps), _adder(1, 1, steps)


_blocks_by_line, _block_by_line, _line_by_line = _adders((4 * DEPTH, 4))
_blocks_by_value, _block_by_value, _line_by_value = _adders((4, 4 * LINES))


def _passing(several: Any, block: Any, line: Any, of_line: int) -> Any:
    """For compiled code: all tokens pass by a tile, whose lines are `of_line` elements apart."""

    @njit(nogil=True)
    def run(tile: Any, lines: Any, depth: Any, x: Any, value: Any, out: Any, first: Any) -> None:
        """out[:, first + i] += line i of a tile · x[:, value to value + depth]."""
        weights, given, found = tile.reshape(-1), x.reshape(-1), out.reshape(-1)
        x_step, out_step = x.shape[1] * LANES, out.shape[1] * LANES
        whole, panel = lines // BLOCK * BLOCK, 0
        while panel < x.shape[0]:
            at, to = panel * x_step + value * LANES, panel * out_step + first * LANES
            count = PANELS if panel + PANELS <= x.shape[0] else 1
            for i in range(0, whole, BLOCK):
                here, there = i * of_line, to + i * LANES
                if count == PANELS:
                    several(weights, here, given, at, x_step, found, there, out_step, depth)
                else:
                    block(weights, here, given, at, x_step, found, there, out_step, depth)
            for one in range(count):
                for i in range(whole, lines):
                    there = to + one * out_step + i * LANES
                    line(
                        weights, i * of_line, given, at + one * x_step, x_step, found, there, out_step, depth
                    )
            panel += count

    return run


_pass_lines: Any = _passing(_blocks_by_line, _block_by_line, _line_by_line, DEPTH)
_pass_values: Any = _passing(_blocks_by_value, _block_by_value, _line_by_value, 1)


@njit(cache=True, nogil=True)
def _multiply(
    codec: Any, memory: Any, at: Any, size: Any, width: Any, x: Any, value: Any, out: Any, first: Any
) -> None:
    tile = np.empty((LINES, DEPTH), np.float32)
    last, line = at.shape[0] - 1, _CACHE_LINE // memory.itemsize
    for start in range(0, at.shape[0], LINES):
        lines, asked = min(LINES, at.shape[0] - start), 0
        for column in range(0, width, DEPTH):
            depth = min(DEPTH, width - column)
            until = size * (column + depth) // width
            for i in range(lines):
                codec.widen_row(memory, at[start + i], column, width, tile[i, :depth])
                following = at[min(start + LINES + i, last)]
                for j in range(asked, until, line):  # of the rows that come next: they lie anywhere
                    fetch(memory, following + j)
            asked = until
            _pass_lines(tile, lines, depth, x, value + column, out, first + start)


@njit(cache=True, nogil=True)
def _combine(
    codec: Any, memory: Any, at: Any, width: Any, start: Any, stop: Any, x: Any, value: Any, out: Any
) -> None:
    tile = np.empty((DEPTH, LINES), np.float32)
    for column in range(start, stop, LINES):
        lines = min(LINES, stop - column)
        for vector in range(0, at.shape[0], DEPTH):
            depth = min(DEPTH, at.shape[0] - vector)
            for i in range(depth):
                codec.widen_row(memory, at[vector + i], column, width, tile[i, :lines])
            _pass_values(tile, lines, depth, x, value + vector, out, column)


def multiply(
    rows: Rows, vectors: npt.NDArray[np.integer[Any]], x: F32, out: F32, value: int = 0, first: int = 0
) -> None:
    """out[:, first + i] += vector i of the rows · x[:, value …], for as many values as a row has.

    x [panels, values, LANES], out [panels, results, LANES]. Vectors are counted through all lines. On this
    thread, without the interpreter's lock: callers divide the work among threads.
    """
    flat, at = _placed(rows, vectors)
    _multiply(loops(rows.codec), flat, at, rows.elements, rows.width, x, value, out, first)


def combine(
    rows: Rows, vectors: npt.NDArray[np.integer[Any]], columns: slice, x: F32, out: F32, value: int = 0
) -> None:
    """out[:, columns] += Σ x[:, value + i] · those columns of vector i of the rows, in ascending i.

    As `multiply`; `columns` begin and end at whole runs of the rows' format.
    """
    flat, at = _placed(rows, vectors)
    _combine(loops(rows.codec), flat, at, rows.width, columns.start, columns.stop, x, value, out)


def _placed(rows: Rows, vectors: npt.NDArray[np.integer[Any]]) -> tuple[Any, npt.NDArray[np.int64]]:
    """Flat memory, and the elements at which vectors begin."""
    if rows.count == 1:
        return rows.memory.reshape(-1), vectors * np.int64(rows.memory.shape[1]) + rows.start
    line, within = np.divmod(vectors.astype(np.int64), rows.count)
    return rows.memory.reshape(-1), line * rows.memory.shape[1] + rows.start + within * rows.elements


# Both go through a panel by some values at a time: as many of all its tokens as the first cache holds.


@njit(cache=True, nogil=True)
def _fill(x: Any, tokens: Any, out: Any) -> None:
    for panel in range(out.shape[0]):
        first = panel * LANES
        count = min(LANES, tokens.shape[0] - first)
        for start in range(0, out.shape[1], LINES):
            stop = min(start + LINES, out.shape[1])
            for lane in range(count):
                row = x[tokens[first + lane]]
                for j in range(start, stop):
                    out[panel, j, lane] = row[j]


@njit(cache=True, nogil=True)
def _empty(panels: Any, out: Any) -> None:
    for panel in range(panels.shape[0]):
        first = panel * LANES
        count = min(LANES, out.shape[0] - first)
        for start in range(0, out.shape[1], LINES):
            stop = min(start + LINES, out.shape[1])
            for lane in range(count):
                row = out[first + lane]
                for j in range(start, stop):
                    row[j] = panels[panel, j, lane]


def in_panels(x: F32, tokens: npt.NDArray[np.integer[Any]] | None = None) -> F32:
    """[panels, values, LANES] of x [tokens, values], or of some of its tokens. Behind the last are zeros."""
    which = np.arange(len(x)) if tokens is None else tokens.astype(np.int64)
    out = new_panels(which.size, x.shape[1])
    _fill(x, which, out)
    return out


def out_of_panels(panels: F32, out: F32) -> F32:
    """The inverse of `in_panels`, into out [tokens, values]."""
    _empty(panels, out)
    return out


def new_panels(tokens: int, values: int, start: F32 | None = None) -> F32:
    """Panels of so many tokens, which all start with the same values [values], or with zeros."""
    out = np.zeros((-(-tokens // LANES), values, LANES), np.float32)
    if start is not None and start.size:
        out += start[:, None]
    return out
