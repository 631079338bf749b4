"""Kernels against float64, and the bits that must not depend on threads, slots or segments."""

from __future__ import annotations

import math
import runpy

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numba import njit, prange
from widening import widened

from storage.architecture import Attention, Norm, QkNorm
from storage.codecs import CODECS, Codec, narrow, widen
from storage.layout import Rows, neuron
from workers import kernels
from workers.kernels import attention, codecs, experts, launch
from workers.kernels.rows import loops

DTYPES = ("float32", "float16", "bfloat16")
FUNCTIONS = ("relu", "gelu", "gelu_tanh")
WIDE = 2 * launch.SMALL  # bytes: more than one thread


def stored(values: np.ndarray, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """`values` rounded to `dtype`: the carrier array, and the same numbers as float64."""
    if dtype == "float32":
        carrier = values.astype(np.float32)
        return carrier, carrier.astype(np.float64)
    if dtype == "float16":
        half = values.astype(np.float16)
        return half.view(np.uint16), half.astype(np.float64)
    bits = (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    return bits, (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def matrix(memory: np.ndarray, dtype: str) -> Rows:
    return Rows.of_matrix(memory, CODECS[dtype])


def neurons(bundles: np.ndarray, dtype: str, width: int) -> tuple[Rows, Rows]:
    """Up and down rows of bundles [slots, at least 2 · width]."""
    return tuple(Rows(bundles, CODECS[dtype], start, width) for start in (0, width))


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def act(x: np.ndarray, function: str) -> np.ndarray:
    if function == "relu":
        return np.maximum(x, 0)
    if function == "gelu":
        return x / 2 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))
    return x / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


sizes = st.integers(1, 150)


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=30, deadline=None)
@given(rows=sizes, width=sizes, biased=st.booleans(), seed=st.integers(0, 99))
def test_matvec(dtype, rows, width, biased, seed):
    weights, exact = stored(normal(seed, rows, width), dtype)
    x, bias = normal(seed + 1, width), normal(seed + 2, rows) if biased else kernels.NO_BIAS
    expected = exact @ x.astype(np.float64) + (bias if biased else 0)
    assert np.allclose(kernels.matvec(matrix(weights, dtype), x, 2, bias), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [*DTYPES, "q8", "q4"])
@settings(max_examples=15, deadline=None)
@given(count=st.integers(1, 9), rows=sizes, biased=st.booleans(), seed=st.integers(0, 99))
def test_several_vectors_have_the_bits_of_each_alone(dtype, count, rows, biased, seed):
    width, codec = 128, CODECS[dtype]
    if dtype in DTYPES:
        weights, _ = stored(normal(seed, rows, width), dtype)
    else:
        weights = codec.narrow(normal(seed, rows, width))
    xs, bias = normal(seed + 1, count, width), normal(seed + 2, rows) if biased else kernels.NO_BIAS
    alone = [kernels.matvec(matrix(weights, dtype), x, 1, bias) for x in xs]
    for threads in (1, 2):
        found = kernels.matvecs(matrix(weights, dtype), xs, threads, bias)
        assert found.tobytes() == np.stack(alone).tobytes()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("function", FUNCTIONS)
@settings(max_examples=15, deadline=None)
@given(slots=sizes, width=sizes, padding=st.integers(0, 9), biased=st.booleans(), seed=st.integers(0, 99))
def test_activate(dtype, function, slots, width, padding, biased, seed):
    rng = np.random.default_rng(seed)
    bundles, exact = stored(normal(seed, slots, 2 * width + padding), dtype)
    count = int(rng.integers(0, slots + 1))
    ids = np.sort(rng.choice(4 * slots, count, replace=False)).astype(np.int32)
    where = rng.choice(slots, count, replace=False).astype(np.int32)
    h, bias = normal(seed + 1, width), normal(seed + 2, 4 * slots) if biased else kernels.NO_BIAS
    pre = exact[where, :width] @ h.astype(np.float64) + (bias[ids] if biased else 0)
    up, _ = neurons(bundles, dtype, width)
    result = kernels.activate(up, ids, where, h, bias, function, 2)
    assert np.allclose(result, act(pre, function) if count else pre, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=30, deadline=None)
@given(slots=sizes, width=sizes, padding=st.integers(0, 9), seed=st.integers(0, 99))
def test_accumulate(dtype, slots, width, padding, seed):
    bundles, exact = stored(normal(seed, slots, 2 * width + padding), dtype)
    where = np.random.default_rng(seed).permutation(slots).astype(np.int32)
    a = np.maximum(normal(seed + 1, slots), 0)
    y = normal(seed + 2, width)
    expected = y + a.astype(np.float64) @ exact[where, width : 2 * width]
    ids = np.random.default_rng(seed + 3).permutation(2 * slots)[:slots].astype(np.int32)
    _, down = neurons(bundles, dtype, width)
    active = kernels.accumulate(down, ids, where, a, y, 2)
    assert active == np.count_nonzero(a)
    assert np.allclose(y, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=30, deadline=None)
@given(count=st.integers(1, 60), width=sizes, sparse=st.booleans(), seed=st.integers(0, 99))
def test_sums_run_by_ascending_ids_whatever_the_order_of_the_parts(dtype, count, width, sparse, seed):
    rng = np.random.default_rng(seed)
    bundles, _ = stored(normal(seed, 70, 2 * width), dtype)
    ids = np.sort(rng.choice(4096, count, replace=False)).astype(np.int32)
    slots = rng.choice(70, count, replace=False).astype(np.int32)
    a = normal(seed + 1, count)
    if sparse:
        a = np.maximum(a, 0)
    whole, parts = np.zeros(width, np.float32), np.zeros(width, np.float32)
    _, down = neurons(bundles, dtype, width)
    kernels.accumulate(down, ids, slots, a, whole, 1)
    order = rng.permutation(count)
    kernels.accumulate(down, ids[order], slots[order], a[order], parts, 2)
    assert whole.tobytes() == parts.tobytes()


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=15, deadline=None)
@given(rank=sizes, seed=st.integers(0, 99))
def test_scores_of_low_rank(dtype, rank, seed):
    d_model, d_ff = 5 + seed, 40 + 7 * seed
    down, exact_down = stored(normal(seed, rank, d_model), dtype)
    up, exact_up = stored(normal(seed + 1, rank, d_ff), dtype)
    x, bias, got = normal(seed + 2, d_model), normal(seed + 3, d_ff), np.empty(d_ff, np.float32)
    kernels.score(CODECS[dtype], down, up, x, np.float32(0.5), bias, got)
    assert np.allclose(got, (exact_down @ (x * 0.5)) @ exact_up + bias, rtol=1e-4, atol=1e-4)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 99), least=st.sampled_from((-1.0, 0.5)), most=st.sampled_from((0.5, math.inf)))
def test_passing_scores_lie_above_one_bound_and_not_above_the_other(seed, least, most):
    scores = np.round(normal(seed, 50), 1)  # so that some lie on a bound
    scores[seed % 50] = np.nan
    ids = np.empty(50, np.intp)
    count = kernels.passing(scores, least, most, ids)
    assert ids[:count].tolist() == [i for i, one in enumerate(scores) if least < one <= most]


def test_every_finite_half_is_widened_exactly():
    bits = np.arange(1 << 16, dtype=np.uint16)
    values = bits.view(np.float16)
    bits, values = bits[np.isfinite(values)], values[np.isfinite(values)]
    out = widened(matrix(bits[:, None], "float16"), np.arange(bits.size), 0, 1)
    assert np.array_equal(out[:, 0], values.astype(np.float32))
    assert np.array_equal(np.signbit(out[:, 0]), np.signbit(values))


def test_every_brain_float_is_widened_exactly():
    bits = np.arange(1 << 16, dtype=np.uint16)
    out = widened(matrix(bits[:, None], "bfloat16"), np.arange(bits.size), 0, 1)
    assert np.array_equal(out[:, 0].view(np.uint32), bits.astype(np.uint32) << 16)


# Odd widths and counts, and more bytes than a single thread is given.
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1023, 1088, 2049])
def test_threads_do_not_change_a_bit(dtype, width):
    count = WIDE // (2 * width) + 3
    bundles, _ = stored(normal(1, count, 2 * width), dtype)
    ids = np.arange(count, dtype=np.int32)
    up, down = neurons(bundles, dtype, width)
    h = normal(2, width)
    results = []
    for threads in (1, 2):
        a = kernels.activate(up, ids, ids, h, kernels.NO_BIAS, "relu", threads)
        y = h.copy()
        kernels.accumulate(down, ids, ids, a, y, threads)
        product = kernels.matvec(matrix(bundles, dtype), np.concatenate([h, h]), threads)
        results.append(b"".join(array.tobytes() for array in (a, y, product)))
    assert results[0] == results[1]


@pytest.mark.parametrize("count", [3, 4, 41])
@pytest.mark.parametrize("width", [1, 511, 512, 513, 1700])
def test_the_division_of_the_columns_does_not_change_a_bit(count, width):
    bundles, _ = stored(normal(1, count, 2 * width), "bfloat16")
    slots, a = np.arange(count, dtype=np.int32), normal(2, count)
    whole, alone = normal(3, width), normal(3, width)
    _, down = neurons(bundles, "bfloat16", width)
    kernels.accumulate(down, slots, slots, a, whole, 1)
    for column in range(width):  # each by itself
        pair = np.ascontiguousarray(bundles[:, [column, width + column]])
        _, down = neurons(pair, "bfloat16", 1)
        kernels.accumulate(down, slots, slots, a, alone[column : column + 1], 1)
    assert whole.tobytes() == alone.tobytes()


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=20, deadline=None)
@given(width=sizes, cuts=st.lists(st.integers(0, 60), max_size=6), seed=st.integers(0, 99))
def test_segments_and_slots_do_not_change_a_bit(dtype, width, cuts, seed):
    rng = np.random.default_rng(seed)
    bundles, _ = stored(normal(seed, 60, 2 * width), dtype)
    ids = np.arange(60, dtype=np.int32)
    h, bias = normal(seed + 1, width), normal(seed + 2, 60)
    whole = np.zeros(width, np.float32)
    up, down = neurons(bundles, dtype, width)
    a = kernels.activate(up, ids, ids, h, bias, "relu", 1)
    kernels.accumulate(down, ids, ids, a, whole, 1)

    slots = rng.permutation(60).astype(np.int32)
    moved = np.empty_like(bundles)
    moved[slots] = bundles
    up, down = neurons(moved, dtype, width)
    y = np.zeros(width, np.float32)
    for some in np.split(ids, sorted(cuts)):
        part = kernels.activate(up, some, slots[some], h, bias, "relu", 2)
        assert part.tobytes() == a[some].tobytes()
        kernels.accumulate(down, some, slots[some], part, y, 2)
    assert y.tobytes() == whole.tobytes()


@pytest.mark.parametrize("dtype", DTYPES)
def test_neurons_that_are_zero_may_be_left_out(dtype):
    bundles, _ = stored(normal(1, 50, 130), dtype)
    ids = np.arange(50, dtype=np.int32)
    up, down = neurons(bundles, dtype, 65)
    a = kernels.activate(up, ids, ids, normal(2, 65), kernels.NO_BIAS, "relu", 1)
    active = ids[a > 0]
    assert 0 < active.size < 50
    whole, sparse = normal(3, 65), normal(3, 65)
    kernels.accumulate(down, ids, ids, a, whole, 1)
    kernels.accumulate(down, active, active, a[active], sparse, 1)
    assert whole.tobytes() == sparse.tobytes()


def test_a_products_sign_is_the_activations():
    """What the oracle predicts from a product is what the FFN computes, bit for bit."""
    bundles, _ = stored(normal(1, 300, 2 * 77), "float16")
    ids = np.arange(300, dtype=np.int32)
    h, bias = normal(2, 77), normal(3, 300)
    up, _ = neurons(bundles, "float16", 77)
    pre = kernels.matvec(matrix(np.ascontiguousarray(up.values), "float16"), h, 1, bias)
    a = kernels.activate(up, ids, ids, h, bias, "relu", 1)
    assert np.maximum(pre, 0).tobytes() == a.tobytes()


@settings(max_examples=30, deadline=None)
@given(
    kv_heads=st.integers(1, 4),
    group=st.integers(1, 4),
    width=st.integers(1, 70),
    length=st.integers(1, 40),
    biased=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
def test_attention(kv_heads, group, width, length, biased, dtype, seed):
    heads, context, position = kv_heads * group, 40, length - 1
    queries, keys = normal(seed, heads, width), normal(seed + 1, kv_heads, context, width)
    values, scores = normal(seed + 2, kv_heads, context, width), np.empty((heads, context), np.float32)
    bias = normal(seed + 3, heads, context) if biased else np.zeros((0, 0), np.float32)
    expected_caches = narrow(keys, dtype), narrow(values, dtype)
    caches = [cache.copy() for cache in expected_caches]
    for cache in caches:
        cache[:, position] = 1  # until the kernel puts the token's own there
    projected = np.concatenate([queries, keys[:, position], values[:, position]]).reshape(-1)
    none, scale, codec = kernels.NO_BIAS, 1 / math.sqrt(width), CODECS[dtype]
    result = kernels.attend(projected, none, none, *caches, position, scale, bias, scores, codec, 2)
    for cache, expected_cache in zip(caches, expected_caches, strict=True):
        assert cache.tobytes() == expected_cache.tobytes()
    keys, values = (widen(array, dtype) for array in caches)
    for head in range(heads):
        k, v = (array[head // group, :length].astype(np.float64) for array in (keys, values))
        weights = k @ queries[head] / math.sqrt(width) + (bias[head, :length] if biased else 0)
        weights = np.exp(weights - weights.max())
        expected = weights @ v / weights.sum()
        assert np.allclose(result[head * width : (head + 1) * width], expected, rtol=1e-5, atol=1e-5)


@settings(max_examples=20, deadline=None)
@given(kv_heads=st.integers(1, 3), group=st.integers(1, 3), half=st.integers(1, 40), seed=st.integers(0, 99))
def test_rotary(kv_heads, group, half, seed):
    """Queries and keys are turned, values are not."""
    heads, width = kv_heads * group, 2 * half
    vectors, angles = normal(seed, heads + 2 * kv_heads, width), normal(seed + 1, half)
    turned = (vectors[:, :half] + 1j * vectors[:, half:]) * np.exp(1j * angles.astype(np.float64))
    expected = np.concatenate([turned.real, turned.imag], axis=1)
    expected[heads + kv_heads :] = vectors[heads + kv_heads :]
    keys, values = (np.zeros((kv_heads, 1, width), np.float32) for _ in range(2))
    projected, scores = vectors.reshape(-1).copy(), np.empty((heads, 1), np.float32)
    no_bias = np.zeros((0, 0), np.float32)
    cos, sin = np.cos(angles), np.sin(angles)
    scale, codec = 1 / math.sqrt(width), CODECS["float32"]
    kernels.attend(projected, cos, sin, keys, values, 0, scale, no_bias, scores, codec, 1)
    assert np.allclose(projected.reshape(-1, width), expected, atol=1e-5)
    assert keys[:, 0].tobytes() == projected.reshape(-1, width)[heads : heads + kv_heads].tobytes()
    assert values[:, 0].tobytes() == vectors[heads + kv_heads :].tobytes()


@pytest.mark.parametrize("cached", ["float32", "float16"])
@pytest.mark.parametrize("dtype", ["float16", "q8", "q4"])
@pytest.mark.parametrize(
    ("over", "kind", "window", "softcap", "sunk"),
    [
        (None, "rms", None, None, False),
        (None, "rms", 5, None, True),
        ("head", "rms", 5, None, False),
        ("whole", "rms", None, 20.0, True),
        ("whole", "layer", 9, None, False),
    ],
)
def test_attention_in_one_launch_is_that_of_its_parts(over, kind, window, softcap, sunk, dtype, cached):
    """Bit for bit: its products, norms and heads by themselves, whatever the number of threads."""
    heads, kv_heads, width, d_model, context, position = 6, 2, 64, 256, 30, 20
    codec, cache = CODECS[dtype], CODECS[cached]
    norm = None if over is None else QkNorm(Norm(1e-5, kind), over)
    described = Attention(heads, kv_heads, width, 0.2, window=window, softcap=softcap, qk_norm=norm)
    qkv, out = (
        Rows.of_matrix(codec.narrow(normal(seed, *shape)), codec)
        for seed, shape in ((1, (described.projected, d_model)), (2, (d_model, described.width)))
    )
    biases = normal(3, described.projected), normal(4, d_model)
    x, angles = normal(5, d_model), normal(6, context, width // 2)
    sizes = (width, width) if over == "head" else (heads * width, kv_heads * width)
    q, k = ((normal(seed, size), normal(seed + 1, size)) for seed, size in zip((7, 9), sizes, strict=True))
    before = [cache.narrow(normal(seed, kv_heads, context, width)) for seed in (11, 12)]
    alibi, cos, sin = normal(13, heads, context), np.cos(angles), np.sin(angles)
    sinks = normal(14, heads if sunk else 0)

    projected, caches = kernels.matvec(qkv, x, 1, biases[0]), [one.copy() for one in before]
    cut = heads * width, (heads + kv_heads) * width
    for (weight, bias), some in zip((q, k), (projected[: cut[0]], projected[cut[0] : cut[1]]), strict=True):
        if norm is not None:
            rows = some.reshape(-1, weight.size)
            normed = kernels.rms_norm(rows, weight, 0, 1e-5)
            rows[:] = normed if kind == "rms" else kernels.layer_norm(rows, weight, bias, 1e-5)
    scores = np.empty((heads, context), np.float32)
    mixed = kernels.attend(
        projected,
        cos[position],
        sin[position],
        *caches,
        position,
        0.2,
        alibi,
        scores,
        cache,
        1,
        window,
        softcap,
        sinks,
    )
    expected = kernels.matvec(out, mixed, 1, biases[1])

    for threads in (1, 2):
        kept = [one.copy() for one in before]
        attending = kernels.Attending(
            described,
            qkv,
            biases[0],
            out,
            biases[1],
            (*q, *k),
            (cos, sin),
            alibi,
            kept,
            cache,
            scores,
            threads,
            sinks,
        )
        for _ in range(3):  # the same token again finds nothing changed
            assert attending(x, position).tobytes() == expected.tobytes()
        assert [one.tobytes() for one in kept] == [one.tobytes() for one in caches]


@pytest.mark.parametrize("threads", [1, 2])
def test_a_stage_begins_when_the_one_before_is_done(threads):
    """Whichever thread has done it: of every chunk of the second stage the whole first one is seen."""
    chunks = 1000

    @njit(parallel=True)
    def run(threads, first, seen):
        progress = launch.stages(2)
        for _ in prange(threads):
            while True:
                chunk = launch.take(progress, 0)
                if chunk >= first.shape[0]:
                    break
                first[chunk] = 1
                launch.tell(progress, 0)
            launch.wait(progress, 0, first.shape[0])
            while True:
                chunk = launch.take(progress, 1)
                if chunk >= first.shape[0]:
                    break
                seen[chunk] = first.sum()

    for _ in range(20):
        first, seen = np.zeros(chunks, np.int64), np.zeros(chunks, np.int64)
        launch.use_threads(threads, WIDE)
        run(threads, first, seen)
        assert (seen == chunks).all()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_rounding_is_that_of_narrow(dtype):
    """Of every half, of the floats around it, of floats of every size, and of what is out of range."""
    halves = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32)
    halves = halves[np.isfinite(halves)]
    ties = halves[:, None].view(np.uint32) + np.array([-1, 0, 1, 0xFFF, 0x1000, 0x1001, 0x8000], np.int64)
    spread = np.arange(0, 1 << 32, 40_503, dtype=np.int64)
    values = np.concatenate([ties.reshape(-1), spread]).astype(np.uint32).view(np.float32)
    values = np.concatenate([values[~np.isnan(values)], np.float32([0, -0.0, np.inf, -np.inf, 65_520])])
    width = 1024
    values = np.resize(values, (-(-values.size // width), width))
    cache = np.zeros((values.shape[0], 1, width), np.uint16)
    attention.put(codecs.scalars(CODECS[dtype]), values, 0, cache)
    assert np.array_equal(cache[:, 0], narrow(values, dtype))


@pytest.mark.parametrize(("weighted", "biased"), [(True, True), (True, False), (False, False)])
@settings(max_examples=20, deadline=None)
@given(width=st.integers(2, 300), seed=st.integers(0, 99))
def test_layer_norm(weighted, biased, width, seed):
    x = normal(seed, width) * 3 + 5
    weight = normal(seed + 1, width) if weighted else kernels.NO_BIAS
    bias = normal(seed + 2, width) if biased else kernels.NO_BIAS
    exact = x.astype(np.float64)
    expected = (exact - exact.mean()) / np.sqrt(exact.var() + 1e-5)
    expected = expected * (weight if weighted else 1) + (bias if biased else 0)
    assert np.allclose(kernels.layer_norm(x, weight, bias, 1e-5), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_neuron_is_the_same_bits_whichever_neurons_are_computed_with_it(dtype):
    """Rows are taken four at a time: neither their places nor what is left over may show."""
    random = np.random.default_rng(4)
    width, count = 200, 11
    values = random.standard_normal((count, 2 * width)).astype(np.float32)
    bundles = values
    if dtype == "float16":
        bundles = values.astype(np.float16).view(np.uint16)
    elif dtype == "bfloat16":
        bundles = (values.view(np.uint32) >> 16).astype(np.uint16)
    h = random.standard_normal(width).astype(np.float32)
    bias = random.standard_normal(count).astype(np.float32)
    every = np.arange(count, dtype=np.int32)
    up, down = neurons(bundles, dtype, width)
    together = kernels.activate(up, every, every, h, bias, "relu", 1)
    for size in (1, 2, 3, 4, 5):
        some = np.sort(random.choice(count, size, replace=False)).astype(np.int32)
        alone = kernels.activate(up, some, some, h, bias, "relu", 1)
        assert alone.tobytes() == together[some].tobytes()
    a = random.standard_normal(count).astype(np.float32)
    a[[2, 7]] = 0
    whole, parts = np.zeros(width, np.float32), np.zeros(width, np.float32)
    kernels.accumulate(down, every, every, a, whole, 1)
    for cut in (every[:3], every[3:4], every[4:10], every[10:]):
        kernels.accumulate(down, cut, cut, a[cut], parts, 1)
    assert parts.tobytes() == whole.tobytes()


def test_both_ways_of_widening_halves_agree():
    """The processor's instruction, and the integers that stand in for it elsewhere."""
    halves = np.arange(1 << 16, dtype=np.uint16)
    finite = halves[np.isfinite(halves.view(np.float16))]

    @codecs.njit
    def by_integers(source, out):
        for i in range(source.shape[0]):
            out[i] = codecs.integer_half(source[i])

    found = np.empty(finite.size, np.float32)
    by_integers(finite, found)
    assert found.tobytes() == finite.view(np.float16).astype(np.float32).tobytes()
    natively = widened(matrix(finite[None], "float16"), np.zeros(1, np.int32), 0, finite.size)
    assert natively.tobytes() == found.tobytes()


@codecs.njit(inline="always")
def widen_byte(code):
    return np.float32((np.int32(code) - 128) / 16)


@codecs.njit(inline="always")
def narrow_to_byte(value):
    return np.uint8(min(max(np.rint(value * 16) + 128, 0), 255))


def test_a_codec_is_registered_from_outside(monkeypatch):
    """By its arrays' functions in one table, and those of a single value in the other."""
    codec = Codec(
        "bytes8",
        1,
        1,
        np.uint8,
        lambda array: (array.astype(np.float32) - 128) / 16,
        lambda array: np.clip(np.rint(array * 16) + 128, 0, 255).astype(np.uint8),
    )
    monkeypatch.setitem(CODECS, "bytes8", codec)
    monkeypatch.setitem(codecs.SCALARS, "bytes8", codecs.Scalars("bytes8", widen_byte, narrow_to_byte))

    width, unit = 100, neuron("bytes8", 100)
    memory = np.random.default_rng(1).integers(0, 256, (50, unit.stride), np.uint8)
    up, down = unit.view(memory, "up"), unit.view(memory, "down")
    ids, slots = np.arange(0, 80, 2, dtype=np.int32), np.arange(40, dtype=np.int32)[::-1].copy()
    h, bias = normal(2, width), normal(3, 80)
    pre = up.widened()[slots].astype(np.float64) @ h + bias[ids]
    a = kernels.activate(up, ids, slots, h, bias, "relu", 2)
    assert np.allclose(a, np.maximum(pre, 0), rtol=1e-5, atol=1e-4)
    y = np.zeros(width, np.float32)
    assert kernels.accumulate(down, ids, slots, a, y, 2) == np.count_nonzero(a)
    assert np.allclose(y, a.astype(np.float64) @ down.widened()[slots], rtol=1e-5, atol=1e-3)
    product = kernels.matvec(down, h, 2)
    assert np.allclose(product, down.widened().astype(np.float64) @ h, rtol=1e-5, atol=1e-4)
    assert np.array_equal(widened(down, slots, 90, 7), down.widened()[slots, 90:97])

    keys, values = (codec.narrow(normal(seed, 2, 3, 8)) for seed in (4, 5))  # of the first two positions
    projected, scores, none = normal(6, 6 * 8), np.empty((2, 3), np.float32), kernels.NO_BIAS
    no_bias = np.zeros((0, 0), np.float32)
    mixed = kernels.attend(projected, none, none, keys, values, 2, 0.5, no_bias, scores, codec, 1)
    assert np.array_equal(keys[:, 2].reshape(-1), codec.narrow(projected[16:32]))
    weights = np.exp(0.5 * np.einsum("htd,hd->ht", codec.widen(keys), projected[:16].reshape(2, 8)))
    expected = np.einsum("ht,htd->hd", weights / weights.sum(1, keepdims=True), codec.widen(values))
    assert np.allclose(mixed, expected.reshape(-1), rtol=1e-4, atol=1e-4)


def test_compiled_kernels_of_a_codec_that_has_changed_are_not_used(tmp_path):
    """Numba keeps them by the types of their arguments, and looks at no file but the kernel's own."""
    file, found = tmp_path / "shifted.py", []
    for shift in (1, 2, 1):
        file.write_text(f"def widen(value):\n    return value + {shift}\n")
        widen = runpy.run_path(str(file))["widen"]
        found.append(codecs.Scalars("shifted", widen, widen)._numba_type_)
    assert found[0] != found[1]
    assert found[0] == found[2]


@njit(parallel=True, nogil=True)
def _chunks_told(codec, memory, at, x, out, rounds):
    """How many chunks two threads have told of, in each round of the same stage."""
    given = codec.prepare(x)
    told = np.empty(rounds, np.int64)
    for number in range(rounds):
        progress = launch.stages(1)
        for _ in prange(2):
            experts._share(progress, 0, codec, memory, at, (x.shape[0], x.shape[0], 4, 4), given, 0, out)
        told[number] = progress[0, 1]
    return told


def test_no_chunk_of_an_experts_stage_is_done_twice():
    """Who waits counts chunks: one that is told of twice hides one that is not done."""
    rows, width, count = 16, 512, 2
    weights = matrix(normal(1, count * rows, width), "float32")
    at, out = np.arange(count, dtype=np.int64) * rows * width, np.empty((count, rows), np.float32)
    launch.use_threads(2, 2 * WIDE)
    told = _chunks_told(loops(weights.codec), weights.memory.reshape(-1), at, normal(2, width), out, 20_000)
    assert np.unique(told).tolist() == [count * rows // 4]
