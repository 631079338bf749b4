"""Products of rows with many tokens: equal to those in float64, and the same bits beside whatever else."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from processors import on_haswell

from pipeline.ring.plan import PANEL
from storage.codecs import CODECS
from storage.layout import Rows
from workers import kernels
from workers.kernels.grouped import processor
from workers.kernels.instructions import LANES

NAMES = sorted(CODECS)
WIDTH, LINES = 640, 83  # values: two tiles and a half; rows: a tile, blocks, and some that fill none


def rows_of(name: str, lines: int = LINES, width: int = WIDTH, seed: int = 0) -> tuple[Rows, np.ndarray]:
    """Random rows, and their values [lines, width] in float64."""
    codec = CODECS[name]
    memory = codec.narrow(np.random.default_rng(seed).standard_normal((lines, width)).astype(np.float32))
    return Rows.of_matrix(memory, codec), codec.widen(memory).astype(np.float64)


def tokens(count: int, width: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, width)).astype(np.float32)


def multiplied(rows: Rows, which: np.ndarray, x: np.ndarray) -> np.ndarray:
    """[tokens, which]."""
    out = kernels.new_panels(len(x), which.size)
    kernels.multiply(rows, which, kernels.in_panels(x), out)
    return kernels.out_of_panels(out, np.empty((len(x), which.size), np.float32))


def combined(rows: Rows, which: np.ndarray, columns: slice, x: np.ndarray) -> np.ndarray:
    """[tokens, columns]."""
    out = kernels.new_panels(len(x), rows.width)
    kernels.combine(rows, which, columns, kernels.in_panels(x), out)
    return kernels.out_of_panels(out, np.empty((len(x), rows.width), np.float32))


@pytest.mark.parametrize("count", [1, LANES, LANES + 1, 3 * LANES, 5 * LANES + 3])
@pytest.mark.parametrize("name", NAMES)
def test_products_are_those_of_the_values(name: str, count: int) -> None:
    rows, exact = rows_of(name)
    which = np.random.default_rng(2).permutation(LINES)
    x = tokens(count, WIDTH)
    spread = np.abs(x) @ np.abs(exact[which].T)
    assert (np.abs(multiplied(rows, which, x) - x.astype(np.float64) @ exact[which].T) <= 1e-6 * spread).all()
    a = tokens(count, LINES, 3)
    for columns in (slice(0, WIDTH), slice(128, 448)):
        found, wanted = combined(rows, which, columns, a), np.zeros((count, WIDTH))
        wanted[:, columns] = a.astype(np.float64) @ exact[which][:, columns]
        spread = np.abs(a) @ np.abs(exact[which])
        assert (np.abs(found - wanted) <= 1e-6 * spread).all()


@pytest.mark.parametrize("name", ["float32", "q4"])
def test_neither_neighbours_nor_parts_change_a_bit(name: str) -> None:
    rows, _ = rows_of(name)
    which, x, a = np.arange(LINES), tokens(70, WIDTH), tokens(70, LINES, 3)
    whole, sums = multiplied(rows, which, x), combined(rows, which, slice(0, WIDTH), a)
    for some in (slice(0, 1), slice(7, 30), slice(64, 70)):
        assert multiplied(rows, which, x[some]).tobytes() == whole[some].tobytes()
        assert combined(rows, which, slice(0, WIDTH), a[some]).tobytes() == sums[some].tobytes()
    order = np.random.default_rng(4).permutation(LINES)
    assert np.array_equal(multiplied(rows, order, x), whole[:, order])
    assert np.array_equal(multiplied(rows, which[5:6], x), whole[:, 5:6])
    assert np.array_equal(combined(rows, which, slice(64, 192), a)[:, 64:192], sums[:, 64:192])


def test_sums_go_on_where_a_part_ended() -> None:
    """Units that lie in two memories, and results and values that begin anywhere."""
    (rows, _), (others, _) = rows_of("q4"), rows_of("q4", seed=5)
    both = Rows.of_matrix(np.concatenate([rows.memory, others.memory]), CODECS["q4"])
    x, a = kernels.in_panels(tokens(20, WIDTH)), kernels.in_panels(tokens(20, 2 * LINES, 3))
    which, all_of_them = np.arange(LINES), np.arange(2 * LINES)
    whole, parts = kernels.new_panels(20, 2 * LINES), kernels.new_panels(20, 2 * LINES)
    kernels.multiply(both, all_of_them, x, whole)
    kernels.multiply(rows, which, x, parts)
    kernels.multiply(others, which, x, parts, first=LINES)
    assert np.array_equal(whole, parts)
    whole, parts = kernels.new_panels(20, WIDTH), kernels.new_panels(20, WIDTH)
    kernels.combine(both, all_of_them, slice(0, WIDTH), a, whole)
    kernels.combine(rows, which, slice(0, WIDTH), a, parts)
    kernels.combine(others, which, slice(0, WIDTH), a, parts, value=LINES)
    assert np.array_equal(whole, parts)
    wide = kernels.in_panels(tokens(20, 3 * WIDTH, 6))
    whole, parts = kernels.new_panels(20, LINES), kernels.new_panels(20, LINES)
    kernels.multiply(rows, which, np.ascontiguousarray(wide[:, WIDTH : 2 * WIDTH]), whole)
    kernels.multiply(rows, which, wide, parts, value=WIDTH)
    assert np.array_equal(whole, parts)


def test_the_planner_counts_whole_panels() -> None:
    assert PANEL == LANES


def test_panels_hold_the_tokens_that_were_named() -> None:
    x, which = tokens(40, 96), np.array([3, 39, 0, *range(20)])
    panels = kernels.in_panels(x, which)
    assert panels.shape == (2, 96, LANES)
    assert np.array_equal(kernels.out_of_panels(panels, np.empty((23, 96), np.float32)), x[which])
    assert not panels[1, :, 23 - LANES :].any()
    started = kernels.new_panels(17, 96, x[0])
    assert started.shape == (2, 96, LANES)
    assert (started == x[0][None, :, None]).all()


def test_code_for_a_smaller_processor_gives_the_same_bits(tmp_path: Path) -> None:
    if not processor().madd:
        pytest.skip("this machine has no AVX2")
    rows, _ = rows_of("q4")
    x = tokens(20, WIDTH)
    np.savez(f"{tmp_path}/given.npz", memory=rows.memory, x=x)
    script = f"""
import numpy as np
from storage.codecs import CODECS
from storage.layout import Rows
from workers import kernels
from workers.kernels import panels
given = np.load(r"{tmp_path}/given.npz")
rows = Rows.of_matrix(given["memory"], CODECS["q4"])
out = kernels.new_panels(20, {LINES})
kernels.multiply(rows, np.arange({LINES}), kernels.in_panels(given["x"]), out)
np.save(r"{tmp_path}/product.npy", out)
(code,) = panels._multiply.inspect_asm().values()
print("zmm" in code, "vfmadd" in code)
"""
    assert on_haswell(script, tmp_path).split("\n")[0] == "False True"
    out = kernels.new_panels(20, LINES)
    kernels.multiply(rows, np.arange(LINES), kernels.in_panels(x), out)
    assert np.load(f"{tmp_path}/product.npy").tobytes() == out.tobytes()
