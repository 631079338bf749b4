"""MXFP4: the codec beside the package `gguf`, and kernels beside float64."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType
from widening import widened

from storage.architecture import Ffn
from storage.codecs import CODECS, MXFP4
from storage.gguf.kept import kept
from storage.layout import ROLES, Row, Rows, Unit
from workers import kernels


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def blocks(seed: int, rows: int, width: int, scales: tuple[int, int] = (110, 130)) -> np.ndarray:
    """Rows of GGUF's blocks: any codes, and scales between these bytes."""
    rng = np.random.default_rng(seed)
    found = rng.integers(0, 256, (rows, width // 32, 17), np.uint8)
    found[:, :, 0] = rng.integers(*scales, found.shape[:2])
    return found.reshape(rows, -1)


def exact(packed: np.ndarray) -> np.ndarray:
    return gguf.dequantize(packed, GGMLQuantizationType.MXFP4)


def stored(packed: np.ndarray) -> np.ndarray:
    rows = kept(packed, "MXFP4")
    assert rows is not None
    return rows


def test_every_scale_and_every_code_is_the_packages_number() -> None:
    """Of scales above these a code is beyond float32."""
    packed = blocks(0, 253, 64)
    packed.reshape(253, 2, 17)[:, :, 0] = np.arange(253)[:, None]
    packed.reshape(253, 2, 17)[:, 1, 1:] = np.arange(16, dtype=np.uint8) * 17
    rows = stored(packed)
    assert rows.shape == (253, 2 * 17)
    assert MXFP4.widen(rows).tobytes() == exact(packed).tobytes()
    assert np.array_equal(widened(Rows.of_matrix(rows, MXFP4), np.arange(253), 0, 64), exact(packed))
    assert np.array_equal(MXFP4.widen(rows[None, :, None])[0, :, 0], exact(packed))


def test_rows_are_cut_along_their_groups() -> None:
    packed = blocks(1, 5, 256)
    rows, grouped = stored(packed), MXFP4.grouped
    assert grouped is not None
    cut = grouped.cut(rows, 2)
    assert cut.shape == (2, 5, 4 * 17)
    assert np.array_equal(np.concatenate(MXFP4.widen(cut), axis=1), exact(packed))
    assert np.array_equal(grouped.cut(rows, 1)[0], rows)


def test_rounding_is_no_worse_than_the_packages_and_exact_numbers_stay() -> None:
    x = normal(2, 64, 256) * np.float32(10) ** normal(3, 64, 1)
    x[0] = 0
    x[1, :32] = 7.5
    error, theirs = (
        np.square(found.astype(np.float64) - x).reshape(-1, 32).sum(1)
        for found in (MXFP4.widen(MXFP4.narrow(x)), exact(gguf.quantize(x, GGMLQuantizationType.MXFP4)))
    )
    assert (error <= theirs * (1 + 1e-6)).all()
    assert (error < 0.9 * theirs).sum() > 20
    once = exact(blocks(4, 64, 256))
    assert np.array_equal(MXFP4.widen(MXFP4.narrow(once)), once)
    with pytest.raises(ValueError, match="not finite"):
        MXFP4.narrow(np.full((1, 64), np.inf, np.float32))


def test_products_and_widened_parts() -> None:
    packed = blocks(5, 75, 320)
    rows, numbers, x = Rows.of_matrix(stored(packed), MXFP4), exact(packed).astype(np.float64), normal(6, 320)
    found = [kernels.matvec(rows, x, threads) for threads in (1, 2)]
    assert (np.abs(found[0] - numbers @ x) <= 1e-5 * (np.abs(numbers) @ np.abs(x))).all()
    assert found[0].tobytes() == found[1].tobytes()
    assert np.array_equal(widened(rows, np.array([7, 0, 74]), 96, 64), numbers[[7, 0, 74], 96:160])


@pytest.mark.parametrize("width", [1, 64])
def test_a_gated_feed_forward(width: int) -> None:
    """Of units of one neuron, and of several, whose down rows lie by output."""
    units, d_model = 6, 128
    unit = Unit(tuple(Row(role, "mxfp4") for role in ROLES["gated"]), width, d_model)
    memory, numbers = np.zeros((units, unit.stride), np.uint8), {}
    for seed, role in enumerate(ROLES["gated"]):
        count, values = unit.shape(role)
        packed = blocks(seed, units * count, values, (116, 122))
        unit.view(memory, role).values[:] = stored(packed).reshape(units, -1)
        numbers[role] = exact(packed).astype(np.float64).reshape(units, count, values)
    ids, h, none = np.arange(units, dtype=np.int32), normal(9, d_model), kernels.NO_BIAS
    ffn = Ffn("gated", units, width, "relu")
    views = unit.view(memory, "gate"), unit.view(memory, "up")
    a = kernels.activate_gated(*views, ids, ids, h, (none, none), ffn, 2)
    expected = np.maximum(numbers["gate"] @ h, 0) * (numbers["up"] @ h)
    assert np.allclose(a, expected.reshape(-1), rtol=1e-4, atol=1e-6)
    y = np.zeros(d_model, np.float32)
    kernels.accumulate(unit.view(memory, "down"), ids, ids, a, y, 2)
    down = numbers["down"]
    one = a.astype(np.float64).reshape(units, width)
    sums = np.einsum("uw,uwd->d", one, down) if width == 1 else np.einsum("uw,udw->d", one, down)
    assert np.allclose(y, sums, rtol=1e-4, atol=1e-6)


def test_the_codec_is_in_the_table() -> None:
    assert CODECS["mxfp4"] is MXFP4
    assert [MXFP4.fits(width) for width in (32, 64, 96, 2880)] == [False, True, False, True]
    assert MXFP4.size(2880) == 90 * 17
