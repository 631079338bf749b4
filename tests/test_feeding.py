"""A layer's FFN in one launch: bit for bit its activations and their sum, made one after the other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import MIXTURES, VARIANTS, write_checkpoint

from storage.architecture import Ffn
from storage.codecs import CODECS
from storage.convert import convert
from storage.layout import ROLES, Row, Rows, Unit
from workers import kernels
from workers.compute.cpu.device import CpuDevice
from workers.compute.weights import Weights
from workers.kernels import launch

FORMATS = ("float32", "float16", "bfloat16", "q8", "q4", "q4s", "mxfp4")
FUNCTIONS = (
    ("relu", {}),
    ("fatrelu", {"threshold": 0.4}),
    ("gelu", {}),
    ("gelu_tanh", {}),
    ("silu", {}),
)


@pytest.fixture(autouse=True)
def small_launches_have_threads_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "SMALL", 0)


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def rows_of(kind: str, formats: tuple[str, ...], width: int, d_model: int, slots: int) -> dict[str, Rows]:
    """Random rows of units of `width` neurons, by role."""
    unit = Unit(tuple(map(Row, ROLES[kind], formats)), width, d_model)
    memory = np.zeros((slots, unit.stride), np.uint8)
    for seed, row in enumerate(unit.rows):
        count, values = unit.shape(row.role)
        stored = CODECS[row.codec].narrow(normal(seed, slots * count, values) / np.float32(8))
        unit.view(memory, row.role).values[:] = stored.reshape(slots, -1)
    return {row.role: unit.view(memory, row.role) for row in unit.rows}


def by_parts(
    rows: dict[str, Rows],
    ids: np.ndarray,
    slots: np.ndarray,
    x: np.ndarray,
    y: np.ndarray,
    biases: Any,
    ffn: Ffn,
) -> tuple[np.ndarray, int]:
    """What one launch is compared with: activations, and how many are not zero."""
    if ffn.kind == "gated":
        a = kernels.activate_gated(rows["gate"], rows["up"], ids, slots, x, biases, ffn, 1)
    else:
        a = kernels.activate(rows["up"], ids, slots, x, biases[1], ffn.activation, 1, threshold=ffn.threshold)
    return a, kernels.accumulate(rows["down"], ids, slots, a, y, 1)


def check(kind: Any, formats: tuple[str, ...], width: int, function: Any, numbers: Any, biased: bool) -> None:
    units, d_model = (300, 640) if width == 1 else (5, 640)  # more than a chunk of everything
    ffn = Ffn(kind, units, width, function, **numbers)
    rows, x = rows_of(kind, formats, width, d_model, units + 2), normal(9, d_model)
    biases = kernels.NO_BIAS, kernels.NO_BIAS
    if biased:
        biases = normal(7, units * width), normal(8, units * width)
    random = np.random.default_rng(3)
    slots = random.permutation(units + 2)[:units].astype(np.int32)
    for some in (np.arange(units), random.permutation(units), random.permutation(units)[: units // 2]):
        ids, own = some.astype(np.int32), slots[some]
        expected = normal(5, d_model)
        a, active = by_parts(rows, ids, own, x, expected, biases, ffn)
        assert active if function != "relu" else 0 < active < a.size
        for threads in (1, 2):
            feeding = kernels.Feeding(rows, biases, ffn, threads)
            for _ in range(3):
                found, y = np.full(ids.size * width, np.nan, np.float32), normal(5, d_model)
                assert feeding(ids, own, x, found, y) == active
                assert found.tobytes() == a.tobytes()
                assert y.tobytes() == expected.tobytes()


@pytest.mark.parametrize("width", [1, 64])
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("kind", ROLES)
def test_of_every_codec(kind: str, name: str, width: int) -> None:
    for biased in (False, True):
        check(kind, (name,) * len(ROLES[kind]), width, "relu", {}, biased)


@pytest.mark.parametrize("width", [1, 64])
@pytest.mark.parametrize(("function", "numbers"), FUNCTIONS)
@pytest.mark.parametrize("kind", ROLES)
def test_of_every_function(kind: str, function: str, numbers: dict[str, float], width: int) -> None:
    check(kind, ("float16",) * len(ROLES[kind]), width, function, numbers, biased=True)


@pytest.mark.parametrize(("function", "above"), [("silu", "relu"), ("clamped_silu", "clamped")])
def test_of_activated_up_products(function: str, above: str) -> None:
    numbers = {"up_activation": above, "limit": 0.7, "alpha": 1.7}
    check("gated", ("float16",) * 3, 1, function, numbers, biased=True)


def test_of_units_whose_rows_have_several_codecs() -> None:
    check("gated", ("q4", "q8", "float16"), 64, "silu", {}, biased=False)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("variant", [name for name in VARIANTS if name not in MIXTURES])
def test_all_units_at_once_are_those_that_come_in_parts(tmp_path: Path, variant: str, threads: int) -> None:
    """On the device, whatever the family."""
    store = convert(
        write_checkpoint(tmp_path / "model", variant, "bfloat16"), tmp_path / "store", name=variant
    )
    device = CpuDevice(Weights(store), 16, threads)
    x = normal(1, 1, store.architecture.d_model)
    for index, layout in enumerate(store.layout.layers):
        memory, ids = store.read_layer(index), np.arange(layout.units, dtype=np.int32)
        device.begin(0, 1, every=False)
        found = []
        for cuts in ([], [layout.units // 3]):
            ffn = device.ffn(index, x)
            for part in np.split(ids, cuts):
                ffn.add(part, part, memory)
            ffn.close()
            found.append((ffn.active, ffn.finish().tobytes()))
        assert found[0] == found[1]
    device.close()
