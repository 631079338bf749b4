"""Eight and four bits beside the format's description: codecs exactly, kernels in float64, and equal bits."""

from __future__ import annotations

import numpy as np
import pytest
from formats import FORMATS, Format, code, random_rows, sizes, values
from hypothesis import given, settings
from hypothesis import strategies as st
from processors import on_haswell
from widening import widened

from storage import nearest
from storage.architecture import Ffn
from storage.codecs import CODECS, FLOATS, LOW_BITS
from storage.layout import ROLES, Row, Rows, Unit
from workers import kernels
from workers.kernels import codecs, grouped, launch, prepare
from workers.kernels.processor import Processor

NAMES = tuple(FORMATS)
FEW = (
    "q8",
    "q8g64",
    "q4",
    "q4g128",
    "q4s",
)  # of loops that take seconds to compile
HERE = Processor.here()
WIDE = 2 * launch.SMALL  # bytes: more than one thread


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def test_the_formats_are_those_of_the_table():
    assert {codec.name for codec in LOW_BITS} == set(FORMATS)
    for codec in LOW_BITS:
        form = FORMATS[codec.name]
        assert (codec.block, codec.bytes) == (form.group, form.row_bytes(form.group))


# -- codecs -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=20, deadline=None)
@given(count=st.integers(1, 5), groups=st.integers(1, 3), seed=st.integers(0, 999))
def test_rows_are_widened_as_they_are_described(name, count, groups, seed):
    rows = random_rows(seed, count, 128 * groups, FORMATS[name])
    expected = values(rows, FORMATS[name]).astype(np.float32)
    widened = CODECS[name].widen(rows)
    assert np.array_equal(widened, expected)
    assert np.array_equal(CODECS[name].widen(rows[None, :, None])[0, :, 0], expected)


def plainly_rounded(x: np.ndarray, form: Format) -> np.ndarray:
    """Groups [n, group] rounded with the scale that the largest value, or the range, asks for; float64."""

    def half(numbers):
        return np.clip(numbers, -65504, 65504).astype(np.float16).astype(np.float64)

    if form.minima:
        low, high = x.min(1, keepdims=True), x.max(1, keepdims=True)
        minimum, scale, least, most = half(low), half((high - low) / 15), 0, 15
    elif form.bits == 8:
        minimum, scale, least, most = 0, half(np.abs(x).max(1, keepdims=True) / 127), -127, 127
    else:
        largest = np.take_along_axis(x, np.abs(x).argmax(1)[:, None], 1)
        minimum, scale, least, most = 0, half(largest / -8), -8, 7
    whole = np.divide(x - minimum, scale, out=np.zeros_like(x), where=scale != 0)
    return minimum + scale * np.clip(np.rint(whole), least, most)


@st.composite
def groups_of_values(draw, group: int):
    """A row of groups: normal, constant, zero, one-sided, or with one outlier; of many sizes."""
    rng = np.random.default_rng(draw(st.integers(0, 9999)))
    kinds = draw(st.lists(st.sampled_from(["normal", "constant", "zero", "shifted", "outlier"]), min_size=1))
    rows = []
    for kind in kinds[:4]:
        x = rng.standard_normal(max(group, 64)) * 10.0 ** draw(st.integers(-9, 2))
        if kind == "constant":
            x[:] = x[0]
        elif kind == "zero":
            x[:] = 0
        elif kind == "shifted":
            x += 20 * x.std()
        elif kind == "outlier":
            x[draw(st.integers(0, x.size - 1))] *= 100
        rows.append(x)
    return np.concatenate(rows).astype(np.float32)[None]


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_the_scale_that_is_searched_is_no_worse_than_the_plain_one(name, data):
    form = FORMATS[name]
    x = data.draw(groups_of_values(form.group))
    rows = CODECS[name].narrow(x)
    assert rows.shape == (1, form.row_bytes(x.shape[1]))
    found = values(rows, form).reshape(-1, form.group)
    exact = x.astype(np.float64).reshape(-1, form.group)
    error = np.sqrt(np.square(found - exact).sum(1))
    plain = np.sqrt(np.square(plainly_rounded(exact, form) - exact).sum(1))
    largest = np.abs(exact).max(1)
    rounding = 1e-6 * largest  # of each value by the search, which is in float32
    if form.minima:  # a refined scale and minimum are rounded once more: by half of their last bits
        spread = (exact.max(1) - exact.min(1)) / 15
        rounding += 15 * np.maximum(2**-11 * spread, 2**-25) + np.maximum(2**-11 * largest, 2**-25)
    assert (error <= plain * (1 + 1e-4) + np.sqrt(form.group) * rounding).all()


@pytest.mark.parametrize("name", NAMES)
def test_the_search_is_worth_it(name):
    form, x = FORMATS[name], normal(1, 64, 512)
    exact = x.astype(np.float64)
    error = np.square(values(CODECS[name].narrow(x), form) - exact).sum()
    plain = np.square(plainly_rounded(exact.reshape(-1, form.group), form).reshape(exact.shape) - exact).sum()
    assert error < (0.99 if form.bits == 8 else 0.95) * plain


@pytest.mark.parametrize("name", NAMES)
def test_what_float16_scales_cannot_reach(name):
    """Larger values become the largest there are, smaller ones zero; nothing becomes infinite."""
    form = FORMATS[name]
    large, small = np.full((1, 128), 1e10, np.float32), np.full((1, 128), 1e-12, np.float32)
    large[0, ::2] *= -1
    found = values(CODECS[name].narrow(large), form)[0]
    assert np.isfinite(found).all()
    assert (found[1::2] > 65504).all()
    assert (found[::2] < -65503).all()
    assert not values(CODECS[name].narrow(small), form).any()


@pytest.mark.parametrize("name", NAMES)
def test_a_group_whose_codes_reach_the_end_is_rounded_again_to_itself(name):
    """Of others the search finds another scale: rounding twice is not rounding once, but costs little."""
    form, codec, x = FORMATS[name], CODECS[name], normal(2, 500, 128)
    rows = codec.narrow(x)
    once = values(rows, form)
    twice = values(codec.narrow(codec.widen(rows)), form)
    wholes = np.abs([[code(row, place, form) for place in range(128)] for row in map(bytes, rows)])
    wholes = wholes.reshape(-1, form.group)
    if form.minima:
        ends = (wholes.max(1) == 15) & (wholes.min(1) == 0)
    else:
        ends = wholes.max(1) == (127 if form.bits == 8 else 8)
    same = (once == twice).reshape(-1, form.group).all(1)
    assert ends.sum() > 100
    assert same[ends].all()
    assert np.square(twice - once).sum() < 0.05 * np.square(once - x).sum()


@pytest.mark.parametrize("name", NAMES)
def test_rows_are_cut_by_whole_groups(name):
    form = FORMATS[name]
    rows = random_rows(3, 4, 768, form)
    parts = CODECS[name].grouped.cut(rows, 3)
    assert parts.shape == (3, 4, form.row_bytes(256))
    whole = values(rows, form)
    for number, part in enumerate(parts):
        assert np.array_equal(values(part, form), whole[:, 256 * number :][:, :256])


def test_scales_are_rounded_as_numpy_rounds_to_float16():
    random = np.random.default_rng(0).integers(0, 2**32, 200_000, np.uint32).view(np.float32)
    halves = np.arange(0x7C00, dtype=np.uint16).view(np.float16).astype(np.float32)
    ties = (halves[1:] + halves[:-1]) / 2
    values = np.concatenate([random[np.isfinite(random)], halves, ties, -ties, [np.float32(65_520)]])
    expected = np.clip(values, -65_504, 65_504).astype(np.float16).astype(np.float32)
    found = np.array([nearest._half(value) for value in values], np.float32)
    assert np.array_equal(found, expected)


@pytest.mark.parametrize("name", NAMES)
def test_rows_that_fit_are_whole_groups_and_pairs_of_runs(name):
    codec = CODECS[name]
    fitting = [width for width in range(513) if codec.fits(width)]
    assert fitting == list(range(max(64, codec.block), 513, max(64, codec.block)))


def test_nothing_is_nothing():
    assert CODECS["q4"].narrow(np.empty((0, 64), np.float32)).shape == (0, 40)
    assert all(CODECS[name].fits(1) and not CODECS[name].fits(0) for name in FLOATS)


# -- kernels ------------------------------------------------------------------------------------


@codecs.njit
def prepare_on(kind, x):
    return kind.prepare(x)


def prepared(name: str, x: np.ndarray) -> tuple[np.ndarray, ...]:
    """The vector as rows of this codec are multiplied with it."""
    return prepare_on(grouped.groups(CODECS[name], exact=False), x)


def whole_numbers(x: np.ndarray, form: Format) -> np.ndarray:
    """x as the products take it: whole numbers times a scale for each group, float64.

    Values are divided in float32, as the kernels do: one that lies next to a half would else be rounded the
    other way.
    """
    groups = x.astype(np.float32).reshape(-1, form.group)
    top, most = np.abs(groups).max(1, keepdims=True), np.float32(16_319)
    inverse = np.divide(most, top, out=np.zeros_like(top), where=top > 0)
    whole = np.rint(groups * inverse).astype(np.float64)
    return (whole * (top / most).astype(np.float64)).reshape(-1)


@pytest.fixture
def exact_activations(monkeypatch):
    monkeypatch.setattr(kernels.ACTIVATIONS, "exact", True)


def off(found: np.ndarray, weights: np.ndarray, x: np.ndarray) -> float:
    """The largest error of products, as a share of the sum of their terms' sizes."""
    terms = np.abs(weights) @ np.abs(x.astype(np.float64))
    return float((np.abs(found - weights @ x.astype(np.float64)) / terms).max())


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=15, deadline=None)
@given(rows=st.integers(1, 9), width=st.sampled_from([128, 256, 384, 1152]), seed=st.integers(0, 99))
def test_a_product_is_that_of_a_rounded_vector(name, rows, width, seed):
    form = FORMATS[name]
    memory, x, bias = random_rows(seed, rows, width, form), normal(seed, width), normal(seed + 1, rows)
    exact = values(memory, form)
    found = kernels.matvec(Rows.of_matrix(memory, CODECS[name]), x, 2, bias)
    rounded = whole_numbers(x, form)
    spread = sizes(memory, form) @ np.abs(rounded) + np.abs(bias)
    assert (np.abs(found - (exact @ rounded + bias)) <= 3e-7 * spread).all()
    half_steps = np.abs(x.reshape(-1, form.group)).max(1) / (2 * 16_319)
    most = np.abs(exact) @ half_steps.repeat(form.group)  # what the rounding of x can make of it
    assert (np.abs(found - (exact @ x.astype(np.float64) + bias)) <= 1.0001 * most + 3e-7 * spread).all()


@pytest.mark.parametrize("name", NAMES)
def test_a_product_of_a_models_width_is_the_dequantised_one(name):
    form = FORMATS[name]
    memory = CODECS[name].narrow(normal(5, 60, 2048))
    exact = values(memory, form)
    for seed in range(3):
        x = normal(seed, 2048)
        assert off(kernels.matvec(Rows.of_matrix(memory, CODECS[name]), x, 2), exact, x) < 1e-5


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.usefixtures("exact_activations")
def test_a_product_of_a_vector_as_it_is(name):
    """Nearer to the dequantised product than any rounding of the vector would be."""
    form = FORMATS[name]
    for width in (128, 1152):
        memory, x, bias = random_rows(width, 7, width, form), normal(4, width), normal(5, 7)
        expected = values(memory, form) @ x.astype(np.float64) + bias
        terms = sizes(memory, form) @ np.abs(x.astype(np.float64)) + np.abs(bias)
        found = kernels.matvec(Rows.of_matrix(memory, CODECS[name]), x, 2, bias)
        assert (np.abs(found - expected) <= 3e-7 * terms).all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_does_not_pass_for_a_number(name, value):
    """In the group that has it; the others are as they were."""
    memory = CODECS[name].narrow(np.ones((2, 256), np.float32))
    x = np.ones(256, np.float32)
    x[70] = value
    assert not np.isfinite(kernels.matvec(Rows.of_matrix(memory, CODECS[name]), x, 1)).any()


@pytest.mark.parametrize("name", NAMES)
def test_a_vector_of_next_to_nothing(name):
    memory = CODECS[name].narrow(np.ones((2, 128), np.float32))
    for size in (0, 1e-45, 1e-38, 1e-36):
        product = kernels.matvec(Rows.of_matrix(memory, CODECS[name]), np.full(128, size, np.float32), 1)
        assert (np.abs(product) < 1e-25).all()


def natural_order(numbers: np.ndarray, form: Format) -> np.ndarray:
    """Whole numbers out of their planes, int64."""
    planes = numbers.astype(np.int64)
    if form.bits == 8 and HERE.dot:
        high, low, _ = planes
        return 128 * high + low
    if form.bits == 8:
        return numbers.view(np.int16).astype(np.int64).T.reshape(-1)  # of even places, of odd ones
    halves = 128 * planes[:2] + planes[2:]
    return halves.reshape(2, -1, 16).swapaxes(0, 1).reshape(-1)  # the halves of runs by turns


@pytest.mark.parametrize(("name", "about"), [("q8", None), ("q8g128", None), ("q4", 1), ("q4s", -8)])
def test_the_prepared_vector_is_whole_numbers_and_scales(name, about):
    x, form = normal(1, 256), FORMATS[name]
    numbers, scales, *sums = prepared(name, x)
    rounded = natural_order(numbers, form) * scales.repeat(form.group).astype(np.float64)
    assert np.allclose(rounded, whole_numbers(x, form), rtol=1e-6, atol=0)
    assert len(sums) == (0 if about is None else 1)
    if sums:  # what a minimum, or the code of zero, is multiplied with
        assert np.allclose(sums[0], about * rounded.reshape(-1, form.group).sum(1), rtol=1e-5, atol=1e-5)
    elif HERE.dot:  # what codes with 128 more have too much, a 128th of it
        fours = natural_order(numbers, form).reshape(-1, 4).sum(1)
        assert np.array_equal(numbers[2].view(np.int32), -fours)


Table = dict[str, np.ndarray]  # of each role, [count, width]


def neuron_units(name: str, count: int, width: int, kind: str) -> tuple[Unit, np.ndarray, Table, Table]:
    """Units of one neuron in memory [count, stride], their rows as float64, and the rows' `sizes`."""
    unit = Unit(tuple(Row(role, name) for role in ROLES[kind]), 1, width)
    memory, exact, size = np.zeros((count, unit.stride), np.uint8), {}, {}
    for seed, role in enumerate(ROLES[kind]):
        rows = random_rows(seed, count, width, FORMATS[name])
        start, stop = unit.span(role)
        memory[:, start:stop] = rows
        exact[role], size[role] = values(rows, FORMATS[name]), sizes(rows, FORMATS[name])
    return unit, memory, exact, size


@pytest.mark.parametrize("name", FEW)
@pytest.mark.parametrize("kind", ["plain", "gated"])
def test_a_feed_forward_of_scattered_neurons(name, kind):
    """Of every third id, in slots of any order, beside float64."""
    count, width = 45, 256
    unit, memory, exact, size = neuron_units(name, count, width, kind)
    slots = np.random.default_rng(1).permutation(count)[:30].astype(np.int32)
    ids = 3 * np.arange(30, dtype=np.int32)
    h, biases = normal(9, width), (normal(7, 3 * count), normal(8, 3 * count))
    rounded = whole_numbers(h, FORMATS[name])
    up = exact["up"][slots] @ rounded + biases[1][ids]
    spread = size["up"][slots] @ np.abs(rounded) + np.abs(biases[1][ids])
    if kind == "plain":
        rows = unit.view(memory, "up")
        a = kernels.activate(rows, ids, slots, h, biases[1], "relu", 2)
        expected = np.maximum(up, 0)
    else:
        rows, ffn = (unit.view(memory, "gate"), unit.view(memory, "up")), Ffn("gated", count, 1, "relu")
        a = kernels.activate_gated(*rows, ids, slots, h, biases, ffn, 2)
        gate = exact["gate"][slots] @ rounded + biases[0][ids]
        gates = size["gate"][slots] @ np.abs(rounded) + np.abs(biases[0][ids])
        expected, spread = np.maximum(gate, 0) * up, gates * np.abs(up) + spread * np.abs(gate)
    assert (np.abs(a - expected) <= 1e-5 * spread).all()
    assert 0 < np.count_nonzero(a) < 30
    y = normal(10, width)
    sums = y + a.astype(np.float64) @ exact["down"][slots]
    spread = np.abs(y) + np.abs(a) @ size["down"][slots]
    down = unit.view(memory, "down")
    assert kernels.accumulate(down, ids, slots, a, y, 2) == np.count_nonzero(a)
    assert (np.abs(y - sums) <= 1e-6 * spread).all()


@pytest.mark.parametrize("name", NAMES)
def test_compiled_code_widens_to_the_same_values(name):
    rows = random_rows(4, 9, 512, FORMATS[name])
    exact = values(rows, FORMATS[name]).astype(np.float32)
    which = np.array([8, 0, 3, 3], np.int32)
    for start, width in ((0, 512), (128, 64), (32, 480)):
        out = widened(Rows.of_matrix(rows, CODECS[name]), which, start, width)
        assert np.array_equal(out, exact[which, start : start + width])


@pytest.mark.parametrize("name", FEW)
def test_threads_parts_and_slots_do_not_change_a_bit(name):
    width = 1152
    count = WIDE // FORMATS[name].row_bytes(width) + 3
    unit, memory, _, _ = neuron_units(name, 3, width, "plain")
    memory = np.ascontiguousarray(memory[np.random.default_rng(2).integers(0, 3, count)])
    ids, h = np.arange(count, dtype=np.int32), normal(3, width)
    results = set()
    for threads, seed in ((1, 0), (2, 1), (2, 2)):
        slots = np.random.default_rng(seed).permutation(count).astype(np.int32)
        moved = np.empty_like(memory)
        moved[slots] = memory
        up, down = unit.view(moved, "up"), unit.view(moved, "down")
        matrix = Rows.of_matrix(np.ascontiguousarray(unit.view(memory, "up").values), CODECS[name])
        product, y, a = kernels.matvec(matrix, h, threads), h.copy(), []
        for part in np.split(ids, [5, count // 2] if seed else []):
            a.append(kernels.activate(up, part, slots[part], h, kernels.NO_BIAS, "relu", threads))
            kernels.accumulate(down, part, slots[part], a[-1], y, threads)
        assert np.concatenate(a).tobytes() == np.maximum(product, 0).tobytes()
        results.add(product.tobytes() + y.tobytes())
    assert len(results) == 1


@pytest.mark.parametrize("names", [*((name,) * 3 for name in (*FLOATS, *FEW)), ("q4", "q4", "q8")])
def test_a_unit_of_several_neurons_is_its_neurons(names):
    """Activations have the same bits; the sum over down rows, which lie by output, is that in float64."""
    neurons, d_model, units = 128, 256, 5
    unit = Unit(tuple(map(Row, ROLES["gated"], names)), neurons, d_model)
    memory, exact = np.zeros((units, unit.stride), np.uint8), {}
    for seed, row in enumerate(unit.rows):
        count, width = unit.shape(row.role)
        codec = CODECS[row.codec]
        stored = codec.narrow(normal(seed, units, count, width) / np.float32(16))
        start, stop = unit.span(row.role)
        memory[:, start:stop] = np.ascontiguousarray(stored).view(np.uint8).reshape(units, -1)
        exact[row.role] = codec.widen(stored).astype(np.float64)
        assert unit.view(memory, row.role).widened().tobytes() == codec.widen(stored).tobytes()
    assert exact["down"].shape == (units, d_model, neurons)

    slots = np.array([3, 0, 4], np.int32)
    ids, h = np.array([6, 1, 2], np.int32), normal(9, d_model)
    ffn, biases = Ffn("gated", 8, neurons, "silu"), (normal(7, 8 * neurons), normal(8, 8 * neurons))
    rows = unit.view(memory, "gate"), unit.view(memory, "up")
    a = kernels.activate_gated(*rows, ids, slots, h, biases, ffn, 2)
    each = (ids[:, None] * neurons + np.arange(neurons)).reshape(-1).astype(np.int32)
    where = (slots[:, None] * neurons + np.arange(neurons)).reshape(-1).astype(np.int32)
    single = [Rows(one.values.reshape(-1, one.elements), one.codec, 0, d_model) for one in rows]
    assert kernels.activate_gated(*single, each, where, h, biases, ffn, 1).tobytes() == a.tobytes()
    plain = kernels.activate(rows[1], ids, slots, h, biases[1], "relu", 2)
    alone = kernels.activate(single[1], each, where, h, biases[1], "relu", 1)
    assert plain.tobytes() == alone.tobytes()

    rounded = a.reshape(3, neurons).astype(np.float64)
    if names[2] in FORMATS:
        rounded = whole_numbers(a, FORMATS[names[2]]).reshape(3, neurons)
    terms = exact["down"][slots] * rounded[:, None]
    sums = set()
    for order in ([0, 1, 2], [2, 0, 1]):
        y = np.zeros(d_model, np.float32)
        active = kernels.accumulate(
            unit.view(memory, "down"), ids[order], slots[order], a.reshape(3, -1)[order].reshape(-1), y, 2
        )
        assert active == np.count_nonzero(a)
        assert (np.abs(y - terms.sum((0, 2))) <= 2e-6 * np.abs(terms).sum((0, 2))).all()
        sums.add(y.tobytes())
    y = np.zeros(d_model, np.float32)
    for place in (1, 2, 0):  # by ascending ids, one call for each
        part = a.reshape(3, -1)[place]
        one = slice(place, place + 1)
        kernels.accumulate(unit.view(memory, "down"), ids[one], slots[one], part, y, 1)
    sums.add(y.tobytes())
    assert len(sums) == 1


PATHS = {
    "none": Processor(),
    "madd": Processor(madd=True, half=HERE.half),
    "dot": Processor(madd=True, dot=True, half=HERE.half),
    "wide": Processor(madd=True, dot=True, wide=True, half=HERE.half),
}


@pytest.mark.parametrize("name", NAMES)
def test_every_processor_computes_the_same_bits(name, monkeypatch):
    """Each set of instructions that this machine has, beside what every processor has."""
    form, width = FORMATS[name], 640
    memory = random_rows(1, 8, width, form)
    memory[0, : width * form.bits // 8] = 0xFF if form.bits == 4 else 0x80  # the largest products
    x = normal(2, width)
    x[:128] = 3.5
    flat, kind = memory.reshape(-1), grouped.groups(CODECS[name], exact=False)
    found, used = {}, {}
    for path, processor in PATHS.items():
        if (processor.madd, processor.dot, processor.wide) > (HERE.madd, HERE.dot, HERE.wide):
            continue
        monkeypatch.setattr(grouped, "_PROCESSOR", processor)
        prepare_vector = codecs.njit(prepare.preparation(kind._numba_type_))

        @codecs.njit  # not kept on disk: what is compiled there is this machine's
        def compute(kind, memory, step, x, y, width, prepare_vector=prepare_vector):
            rows = np.int64(0), step, 2 * step, 3 * step
            later = 4 * step, 5 * step, 6 * step, 7 * step
            products = grouped.dots(kind, memory, rows, later, prepare_vector(kind, x))
            grouped.add_four(kind, y[0], y[1], memory, later, rows, np.int64(0), width)
            grouped.widen(kind, memory, step, np.int64(0), width, y[2])
            return products

        y = np.ones((3, width), np.float32)
        products = compute(kind, flat, memory.shape[1], x, y, width)
        found[path] = np.float32(products).tobytes() + y.tobytes()
        (code,) = compute.inspect_llvm().values()
        used[path] = tuple(word in code for word in ("pmadd", "vpdpbusd.256", "vpdpbusd.512"))
    expected = {"none": (False, False, False), "madd": (True, False, False), "dot": (False, True, False)}
    expected["wide"] = (False, form.bits == 4 and form.group < 128, True)  # half as much at a row's end
    assert used == {path: expected[path] for path in used}
    assert len(set(found.values())) == 1


@pytest.mark.parametrize("name", ["q8", "q4"])
def test_another_processor_may_be_named(name, tmp_path):
    """Compiled for AVX2 alone, in a process of its own: the same bits, and none of the longer registers."""
    if not HERE.madd:
        pytest.skip("this machine has no AVX2")
    memory, x = random_rows(1, 40, 640, FORMATS[name]), normal(2, 640)
    np.savez(tmp_path / "given.npz", memory=memory, x=x)
    script = f"""
import numpy as np
from storage.codecs import CODECS
from storage.layout import Rows
from workers import kernels
from workers.kernels import dense
from workers.kernels.processor import Processor
given = np.load(r"{tmp_path / "given.npz"}")
product = kernels.matvec(Rows.of_matrix(given["memory"], CODECS["{name}"]), given["x"], 2)
np.save(r"{tmp_path / "product.npy"}", product)
(code,) = dense._matvec.inspect_asm().values()
print(Processor.here(), "zmm" in code, "vpmaddwd" in code)
"""
    assert on_haswell(script, tmp_path).split("\n")[0] == f"{Processor(madd=True, half=True)} False True"
    expected = kernels.matvec(Rows.of_matrix(memory, CODECS[name]), x, 2)
    assert np.load(tmp_path / "product.npy").tobytes() == expected.tobytes()
