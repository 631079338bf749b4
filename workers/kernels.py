"""CPU kernels: products of 16- and 32-bit weights with float32 vectors, compiled by numba.

Weights stay in the checkpoint's dtype; float16 and bfloat16 have no numba type and are held as
uint16 and widened in registers. All sums are float32.

The result of every kernel is the same bits whatever the number of threads: one thread owns a whole
output (a row of a product, a head, a column of an FFN sum), and there is one compiled version of
each loop, which a single thread runs as well. Compiled code is cached in a user directory.

Import this module before torch, so that its settings reach OpenMP.
"""

from __future__ import annotations

import math
import os
import platform
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.directories import user_cache
from storage.codecs import FLOAT32, Codec
from storage.layout import Rows

# Numba and OpenMP read these when they are first loaded. Waiting threads must sleep: four workers
# share the cores, and a thread that spins takes its core from the reader that it waits for
# (a launch on two busy cores took 680 µs spinning and 16 µs sleeping).
os.environ.setdefault("NUMBA_CACHE_DIR", str(user_cache() / "flashring" / "numba"))
os.environ.setdefault("NUMBA_THREADING_LAYER_PRIORITY", "omp tbb workqueue")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numba
from llvmlite import binding, ir
from numba import njit, prange, types
from numba.core import config
from numba.extending import intrinsic
from numba.np.ufunc import threading_layer

F32 = npt.NDArray[np.float32]
I32 = npt.NDArray[np.int32]
Carrier = npt.NDArray[Any]  # float32, or uint16 for the 16-bit dtypes

# Integers, because a kernel specialises on types and not on values; each is one branch outside of
# the inner loop.
KINDS: dict[str, int] = {"float32": 0, "float16": 1, "bfloat16": 2}
ACTIVATIONS: dict[str, int] = {"relu": 0, "gelu": 1, "gelu_tanh": 2}
NO_BIAS: F32 = np.zeros(0, np.float32)

# Reassociation and contraction only: nothing is assumed about NaN, infinity or signed zero.
_FAST = {"reassoc", "contract"}
_SMALL = 1 << 18  # bytes of weights below which a second thread costs more than it saves
_CHUNK = 32  # rows that a thread takes at a time, a multiple of four
_BLOCK = 128  # elements of a row between two looks ahead, a multiple of a cache line's
_LINE = 32  # 16-bit elements of a cache line
_FEWEST_COLUMNS = 512  # of a sum that a thread takes at a time
_MOST_COLUMNS = 4096  # of them stay in the L1 cache


@intrinsic
def _bits(typing_context: Any, bits: Any) -> Any:
    """The float32 whose bits are the uint32 `bits`."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], context.get_value_type(types.float32))

    return types.float32(types.uint32), generate


_as_float: Any = _bits  # called by compiled code with the bits alone


@intrinsic
def _bits_of(typing_context: Any, value: Any) -> Any:
    """The bits of a float32, as uint32."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], context.get_value_type(types.uint32))

    return types.uint32(types.float32), generate


_as_bits: Any = _bits_of


@intrinsic
def _native_half(typing_context: Any, bits: Any) -> Any:
    """float16 → float32 by the processor's own instruction, sixteen at a time where there is AVX-512."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.fpext(builder.bitcast(args[0], ir.HalfType()), ir.FloatType())

    return types.float32(types.uint16), generate


@njit(inline="always")
def _integer_half(bits: Any) -> Any:
    """float16 → float32, exact for every finite value: exponents are re-biased by the product."""
    wide = np.uint32(bits)
    moved = ((wide & np.uint32(0x7FFF)) << np.uint32(13)) | ((wide & np.uint32(0x8000)) << np.uint32(16))
    return _as_float(np.uint32(moved)) * np.float32(2.0**112)


def _converts_halves() -> bool:
    """Whether the processor has the instruction; elsewhere LLVM would call a library that is not there."""
    if platform.machine() in ("aarch64", "arm64"):
        return True
    return bool(binding.get_host_cpu_features().get("f16c"))


_half: Any = _native_half if _converts_halves() else _integer_half


@njit(inline="always")
def _brain(bits: Any) -> Any:
    """bfloat16 → float32."""
    return _as_float(np.uint32(np.uint32(bits) << np.uint32(16)))


@njit(inline="always")
def _to_half(value: Any) -> Any:
    """float32 → float16, to the nearest, ties to even; what is beyond its range becomes its largest."""
    bits = _as_bits(value)
    sign = (bits >> np.uint32(16)) & np.uint32(0x8000)
    size = bits & np.uint32(0x7FFFFFFF)
    if size > np.uint32(0x7F800000):  # NaN
        return np.uint16(sign | np.uint32(0x7E00))
    size = min(size, np.uint32(0x477FE000))  # 65,504
    if size < np.uint32(0x38800000):  # below the least normal: adding ½ leaves units of 2⁻²⁴ in the last bits
        small = _as_bits(_as_float(size) + np.float32(0.5)) - np.uint32(0x3F000000)
        return np.uint16(sign | np.uint32(small))
    tie = (size >> np.uint32(13)) & np.uint32(1)
    rounded = (size - np.uint32(0x38000000) + np.uint32(0xFFF) + tie) >> np.uint32(13)
    return np.uint16(sign | np.uint32(rounded))


@njit(inline="always")
def _to_brain(value: Any) -> Any:
    """float32 → bfloat16, to the nearest, ties to even."""
    bits = _as_bits(value)
    tie = (bits >> np.uint32(16)) & np.uint32(1)
    return np.uint16((bits + np.uint32(0x7FFF) + tie) >> np.uint32(16))


@intrinsic
def _fetch(typing_context: Any, row: Any, index: Any) -> Any:
    """Ask for the cache line of row[index], without waiting for it."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        byte, word = ir.IntType(8).as_pointer(), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [byte, word, word, word])
        prefetch = builder.module.declare_intrinsic("llvm.prefetch", [byte], kind)
        read, near, data_cache = ir.Constant(word, 0), ir.Constant(word, 3), ir.Constant(word, 1)
        builder.call(prefetch, [builder.bitcast(builder.gep(data, [args[1]]), byte), read, near, data_cache])
        return context.get_dummy_value()

    return types.void(row, types.int64), generate


_prefetch: Any = _fetch


@njit(inline="always")
def _single(value: Any) -> Any:
    """float32, as it is."""
    return np.float32(value)


def _dots_of(widen: Any) -> Any:
    """`_dots` for one dtype."""

    @njit(fastmath=_FAST)
    def dots(rows: Any, following: Any, x: Any) -> Any:
        r0, r1, r2, r3 = rows
        n0, n1, n2, n3 = following
        t0 = t1 = t2 = t3 = np.float32(0)
        for start in range(0, x.shape[0], _BLOCK):
            stop = min(start + _BLOCK, x.shape[0])
            for j in range(start, stop, _LINE):
                _prefetch(n0, j)
                _prefetch(n1, j)
                _prefetch(n2, j)
                _prefetch(n3, j)
            b0, b1, b2, b3 = r0[start:stop], r1[start:stop], r2[start:stop], r3[start:stop]
            some = x[start:stop]
            s0 = s1 = s2 = s3 = np.float32(0)
            for j in range(some.shape[0]):
                s0 += widen(b0[j]) * some[j]
                s1 += widen(b1[j]) * some[j]
                s2 += widen(b2[j]) * some[j]
                s3 += widen(b3[j]) * some[j]
            t0 += s0
            t1 += s1
            t2 += s2
            t3 += s3
        return t0, t1, t2, t3

    return dots


_dots_of_singles, _dots_of_halves, _dots_of_brains = _dots_of(_single), _dots_of(_half), _dots_of(_brain)


@njit(fastmath=_FAST)
def _dots(rows: Any, following: Any, x: Any, kind: Any) -> Any:
    """Sums of row[j] · x[j] for each of four rows at once, while the four `following` rows are asked for.

    The rows may lie anywhere. A row's sum is the same bits whichever rows are its neighbours. Asking for
    rows matters where one core must fetch them, because the other is busy: a token of OPT-6.7B's shape took
    one thread 464 instead of 513 ms, and two threads, at the memory's speed, 279 either way.
    """
    if kind == 2:
        return _dots_of_brains(rows, following, x)
    if kind == 1:
        return _dots_of_halves(rows, following, x)
    return _dots_of_singles(rows, following, x)


@njit(inline="always")
def _four(i: Any, last: Any) -> Any:
    """The four places from `i` on. At the end the last one several times: its result is the same bits."""
    return min(i, last), min(i + 1, last), min(i + 2, last), min(i + 3, last)


# Without reassociation: y must be summed in the order of the calls, however they are grouped.
@njit(fastmath={"contract"})
def _add_four(y: Any, a: Any, r0: Any, r1: Any, r2: Any, r3: Any, kind: Any) -> None:
    """y[j] += a[0] · r0[j], then a[1] · r1[j], and so on."""
    a0, a1, a2, a3 = a[0], a[1], a[2], a[3]
    if kind == 2:
        for j in range(y.shape[0]):
            t = y[j] + a0 * _brain(r0[j])
            t += a1 * _brain(r1[j])
            t += a2 * _brain(r2[j])
            y[j] = t + a3 * _brain(r3[j])
    elif kind == 1:
        for j in range(y.shape[0]):
            t = y[j] + a0 * _half(r0[j])
            t += a1 * _half(r1[j])
            t += a2 * _half(r2[j])
            y[j] = t + a3 * _half(r3[j])
    else:
        for j in range(y.shape[0]):
            t = y[j] + a0 * np.float32(r0[j])
            t += a1 * np.float32(r1[j])
            t += a2 * np.float32(r2[j])
            y[j] = t + a3 * np.float32(r3[j])


@njit(fastmath={"contract"})
def _add_one(y: Any, a: Any, row: Any, kind: Any) -> None:
    """As `_add_four`, for what is left of the rows."""
    if kind == 2:
        for j in range(y.shape[0]):
            y[j] += a * _brain(row[j])
    elif kind == 1:
        for j in range(y.shape[0]):
            y[j] += a * _half(row[j])
    else:
        for j in range(y.shape[0]):
            y[j] += a * np.float32(row[j])


@njit(fastmath=_FAST)
def _activation(x: Any, function: Any) -> Any:
    if function == 0:
        return x if x > np.float32(0) else np.float32(0)
    if function == 1:
        return np.float32(0.5) * x * (np.float32(1) + np.float32(math.erf(x * np.float32(math.sqrt(0.5)))))
    inner = np.float32(math.sqrt(2 / math.pi)) * (x + np.float32(0.044715) * x * x * x)
    return np.float32(0.5) * x * (np.float32(1) + np.float32(math.tanh(inner)))


@intrinsic
def _take(typing_context: Any, counter: Any) -> Any:
    """The value of the array's only element, which is one more afterwards: each goes to one thread."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        array = context.make_array(signature.args[0])(context, builder, args[0])
        return builder.atomic_rmw("add", array.data, ir.Constant(ir.IntType(64), 1), "monotonic")

    return types.int64(counter), generate


_next: Any = _take  # called by compiled code with the counter alone


# Threads take chunks of a launch as they come: the cores are shared with the other workers, and a
# thread that gets less of its core must not keep the others waiting.


@njit(parallel=True, fastmath=_FAST, cache=True, nogil=True)
def _matvec(weights: Any, x: Any, bias: Any, out: Any, kind: Any, counter: Any, threads: Any) -> None:
    biased = bias.shape[0] > 0
    last = weights.shape[0] - 1
    for _ in prange(threads):
        while True:
            start = _next(counter) * _CHUNK
            if start > last:
                break
            # Four rows at a time keep more of the memory under way than one.
            for i in range(start, min(start + _CHUNK, last + 1), 4):
                i0, i1, i2, i3 = _four(i, last)
                n0, n1, n2, n3 = _four(i + 4, last)
                rows = (weights[i0], weights[i1], weights[i2], weights[i3])
                following = (weights[n0], weights[n1], weights[n2], weights[n3])
                t0, t1, t2, t3 = _dots(rows, following, x, kind)
                if biased:
                    t0 += bias[i0]
                    t1 += bias[i1]
                    t2 += bias[i2]
                    t3 += bias[i3]
                out[i0] = t0
                out[i1] = t1
                out[i2] = t2
                out[i3] = t3


@njit(parallel=True, fastmath=_FAST, cache=True, nogil=True)
def _activate(
    bundles: Any,
    ids: Any,
    slots: Any,
    h: Any,
    bias: Any,
    out: Any,
    kind: Any,
    function: Any,
    counter: Any,
    threads: Any,
) -> None:
    biased = bias.shape[0] > 0
    last = slots.shape[0] - 1
    for _ in prange(threads):
        while True:
            start = _next(counter) * _CHUNK
            if start > last:
                break
            for i in range(start, min(start + _CHUNK, last + 1), 4):
                i0, i1, i2, i3 = _four(i, last)
                n0, n1, n2, n3 = _four(i + 4, last)
                rows = (bundles[slots[i0]], bundles[slots[i1]], bundles[slots[i2]], bundles[slots[i3]])
                following = (bundles[slots[n0]], bundles[slots[n1]], bundles[slots[n2]], bundles[slots[n3]])
                t0, t1, t2, t3 = _dots(rows, following, h, kind)
                if biased:
                    t0 += bias[ids[i0]]
                    t1 += bias[ids[i1]]
                    t2 += bias[ids[i2]]
                    t3 += bias[ids[i3]]
                out[i0] = _activation(t0, function)
                out[i1] = _activation(t1, function)
                out[i2] = _activation(t2, function)
                out[i3] = _activation(t3, function)


@njit(parallel=True, fastmath=_FAST, cache=True, nogil=True)
def _accumulate(
    bundles: Any, slots: Any, first: Any, a: Any, y: Any, kind: Any, chunk: Any, counter: Any, threads: Any
) -> None:
    width = y.shape[0]
    for _ in prange(threads):
        while True:
            start = _next(counter) * chunk
            if start >= width:
                break
            stop = min(start + chunk, width)
            part = y[start:stop]
            low, high = first + start, first + stop
            whole = slots.shape[0] // 4 * 4
            for i in range(0, whole, 4):
                _add_four(
                    part,
                    a[i : i + 4],
                    bundles[slots[i], low:high],
                    bundles[slots[i + 1], low:high],
                    bundles[slots[i + 2], low:high],
                    bundles[slots[i + 3], low:high],
                    kind,
                )
            for i in range(whole, slots.shape[0]):
                _add_one(part, a[i], bundles[slots[i], low:high], kind)


@njit(parallel=True, fastmath=_FAST, cache=True, nogil=True)
def _attend(
    queries: Any, keys: Any, values: Any, length: Any, scale: Any, bias: Any, scores: Any, out: Any, kind: Any
) -> None:
    heads, width = queries.shape
    group = heads // keys.shape[0]
    biased = bias.shape[0] > 0
    last = length - 1
    for head in prange(heads):
        shared = head // group
        query, score = queries[head], scores[head]
        key, value = keys[shared], values[shared]
        for t in range(0, length, 4):  # as in _matvec
            t0, t1, t2, t3 = _four(t, last)
            n0, n1, n2, n3 = _four(t + 4, last)
            rows, following = (key[t0], key[t1], key[t2], key[t3]), (key[n0], key[n1], key[n2], key[n3])
            s0, s1, s2, s3 = _dots(rows, following, query, kind)
            score[t0] = s0
            score[t1] = s1
            score[t2] = s2
            score[t3] = s3
        highest = np.float32(-np.inf)
        for t in range(length):
            score[t] *= scale
            if biased:
                score[t] += bias[head, t]
            highest = max(highest, score[t])
        total = np.float32(0)
        for t in range(length):
            score[t] = np.float32(math.exp(score[t] - highest))
            total += score[t]
        result = out[head * width : (head + 1) * width]
        for j in range(width):
            result[j] = np.float32(0)
        whole = length // 4 * 4
        for t in range(0, whole, 4):
            _add_four(result, score[t : t + 4], value[t], value[t + 1], value[t + 2], value[t + 3], kind)
        for t in range(whole, length):
            _add_one(result, score[t], value[t], kind)
        for j in range(width):
            result[j] /= total


@njit(fastmath=_FAST, cache=True, nogil=True)
def _activate_all(x: Any, function: Any) -> None:
    for i in range(x.shape[0]):
        row = x[i]
        for j in range(row.shape[0]):
            row[j] = _activation(row[j], function)


@njit(cache=True, nogil=True)
def _layer_norms(x: Any, weight: Any, bias: Any, epsilon: Any, out: Any) -> None:
    for i in range(x.shape[0]):
        _layer_norm(x[i], weight, bias, epsilon, out[i])


@njit(fastmath=_FAST, nogil=True)
def _layer_norm(x: Any, weight: Any, bias: Any, epsilon: Any, out: Any) -> None:
    width = x.shape[0]
    mean = np.float32(0)
    for j in range(width):
        mean += x[j]
    mean /= np.float32(width)
    variance = np.float32(0)
    for j in range(width):
        variance += (x[j] - mean) * (x[j] - mean)
    scale = np.float32(1) / np.float32(math.sqrt(variance / np.float32(width) + epsilon))
    weighted = weight.shape[0] > 0
    biased = bias.shape[0] > 0
    for j in range(width):
        value = (x[j] - mean) * scale
        if weighted:
            value *= weight[j]
        if biased:
            value += bias[j]
        out[j] = value


@njit(fastmath=_FAST, cache=True, nogil=True)
def _rotate(vectors: Any, cos: Any, sin: Any) -> None:
    half = cos.shape[0]
    for i in range(vectors.shape[0]):
        for j in range(half):
            low, high = vectors[i, j], vectors[i, half + j]
            vectors[i, j] = low * cos[j] - high * sin[j]
            vectors[i, half + j] = high * cos[j] + low * sin[j]


@njit(cache=True, nogil=True)
def _put(vectors: Any, position: Any, cache: Any, kind: Any) -> None:
    """Round `vectors` [heads, head_dim] into row `position` of `cache` [heads, context, head_dim]."""
    for head in range(vectors.shape[0]):
        row = cache[head, position]
        for j in range(row.shape[0]):
            if kind == 2:
                row[j] = _to_brain(vectors[head, j])
            elif kind == 1:
                row[j] = _to_half(vectors[head, j])
            else:
                row[j] = vectors[head, j]


@njit(cache=True, nogil=True)
def _keep_and_attend(
    projected: Any,
    cos: Any,
    sin: Any,
    keys: Any,
    values: Any,
    position: Any,
    scale: Any,
    bias: Any,
    scores: Any,
    out: Any,
    kind: Any,
) -> None:
    heads, width = scores.shape[0], keys.shape[2]
    vectors = projected.reshape(-1, width)
    shared = heads + keys.shape[0]
    _rotate(vectors[:shared], cos, sin)
    _put(vectors[heads:shared], position, keys, kind)
    _put(vectors[shared:], position, values, kind)
    _attend(vectors[:heads], keys, values, position + 1, scale, bias, scores, out, kind)


@njit(cache=True, nogil=True)
def _ascending(ids: Any, a: Any) -> Any:
    """Places of the activations that are not zero, by ascending id."""
    places = np.empty(ids.shape[0], np.int64)
    count = 0
    last = -1
    ordered = True
    for i in range(ids.shape[0]):
        if a[i] != 0:
            places[count] = i
            count += 1
            ordered = ordered and ids[i] > last
            last = max(last, ids[i])
    places = places[:count]
    if ordered:
        return places
    place_of = np.full(last + 1, -1, np.int64)
    for place in places:
        place_of[ids[place]] = place
    count = 0
    for place in place_of:
        if place >= 0:
            places[count] = place
            count += 1
    return places


@njit(cache=True, nogil=True)
def _sum(
    bundles: Any, ids: Any, slots: Any, a: Any, first: Any, y: Any, kind: Any, chunk: Any, threads: Any
) -> Any:
    places = _ascending(ids, a)
    _accumulate(bundles, slots[places], first, a[places], y, kind, chunk, np.zeros(1, np.int64), threads)
    return places.shape[0]


@njit(cache=True, nogil=True)
def _gather(bundles: Any, slots: Any, start: Any, out: Any, kind: Any) -> None:
    for i in range(slots.shape[0]):
        row = bundles[slots[i], start : start + out.shape[1]]
        target = out[i]
        if kind == 2:
            for j in range(target.shape[0]):
                target[j] = _brain(row[j])
        elif kind == 1:
            for j in range(target.shape[0]):
                target[j] = _half(row[j])
        else:
            for j in range(target.shape[0]):
                target[j] = row[j]


def _launch(threads: int, weight_bytes: int) -> int:
    """Choose the number of threads for the next launch; returns it."""
    most: int = config.NUMBA_NUM_THREADS  # type: ignore[attr-defined]
    wanted = 1 if weight_bytes < _SMALL else max(1, min(threads, most))
    numba.set_num_threads(wanted)
    return wanted


def _columns(width: int, threads: int) -> int:
    """Columns of a sum that a thread takes at a time: two pieces for each, as long as they may be.

    Long pieces of rows come faster: at 4,096 columns 2,048 at a time brought one thread 7.5 instead of
    5.4 GB/s, 1,024 two threads 9.3 instead of 7.8.
    """
    even = width // (2 * threads) // _LINE * _LINE
    return max(_FEWEST_COLUMNS, min(even, _MOST_COLUMNS))


def matvec(weights: Rows, x: F32, threads: int, bias: F32 = NO_BIAS, out: F32 | None = None) -> F32:
    """`weights @ x + bias`: weights [out, in], x [in]; returns [out]."""
    assert weights.start == 0
    memory = weights.memory
    result = np.empty(memory.shape[0], np.float32) if out is None else out
    launched = _launch(threads, memory.nbytes)
    _matvec(memory, x, bias, result, KINDS[weights.codec.name], np.zeros(1, np.int64), launched)
    return result


def activate(
    up: Rows,
    ids: I32,
    slots: I32,
    h: F32,
    bias: F32,
    function: str,
    threads: int,
    out: F32 | None = None,
) -> F32:
    """Activations [n] of the neurons `ids` [n], whose up-projection rows lie in `slots` [n].

    `bias` [d_ff] is indexed by id, or empty.
    """
    assert up.start == 0
    result = np.empty(slots.shape[0], np.float32) if out is None else out
    launched = _launch(threads, slots.shape[0] * h.shape[0] * up.memory.itemsize)
    counter = np.zeros(1, np.int64)
    _activate(
        up.memory,
        ids,
        slots,
        h,
        bias,
        result,
        KINDS[up.codec.name],
        ACTIVATIONS[function],
        counter,
        launched,
    )
    return result


def accumulate(down: Rows, ids: I32, slots: I32, a: F32, y: F32, threads: int) -> int:
    """y [d_model] += Σ a[i] · down-projection column of slots[i], by ascending ids[i]; all [n].

    Each column is summed strictly in that order, so that a sum may be continued by another call.
    Zero activations are skipped: for ReLU they change nothing. Returns the number of the others.
    """
    launched = _launch(threads, slots.shape[0] * y.shape[0] * down.memory.itemsize)
    columns = _columns(y.shape[0], launched)
    active: int = _sum(down.memory, ids, slots, a, down.start, y, KINDS[down.codec.name], columns, launched)
    return active


def combine(rows: Rows, a: F32, bias: F32) -> F32:
    """bias + Σ a[i] · rows[i]: rows [n, d], a [n], bias [d]; returns [d]. One thread.

    For few long rows: `matvec` by their transpose, many short ones, takes twice as long.
    """
    y = bias.copy()
    _launch(1, 0)
    every = np.arange(rows.memory.shape[0], dtype=np.int32)
    kind, columns = KINDS[rows.codec.name], _columns(y.shape[0], 1)
    _accumulate(rows.memory, every, rows.start, a, y, kind, columns, np.zeros(1, np.int64), 1)
    return y


def attend(
    projected: F32,
    cos: F32,
    sin: F32,
    keys: Carrier,
    values: Carrier,
    position: int,
    scale: float,
    bias: F32,
    scores: F32,
    codec: Codec,
    threads: int,
) -> F32:
    """Attention of the token at `position`; returns [heads · head_dim].

    projected [(heads + 2 · kv_heads) · head_dim]: its queries, keys and values, of which the first two
    are rotated in place by cos and sin [head_dim / 2], or not where these are empty. Keys and values go
    into the caches, [kv_heads, context, head_dim] of `dtype`'s carrier, before they are attended to.
    bias [heads, context] is added to the scaled scores, or has no rows; scores [heads, context] is scratch.
    """
    heads, width = scores.shape[0], keys.shape[2]
    out = np.empty(heads * width, np.float32)
    _launch(threads, heads * (position + 1) * width * 2 * keys.itemsize)
    kind = KINDS[codec.name]
    _keep_and_attend(projected, cos, sin, keys, values, position, np.float32(scale), bias, scores, out, kind)
    return out


def layer_norm(x: F32, weight: F32, bias: F32, epsilon: float) -> F32:
    """Normalised x [..., d]; weight and bias [d] may be empty."""
    out = np.empty(x.shape, np.float32)
    width = x.shape[-1]
    _layer_norms(x.reshape(-1, width), weight, bias, np.float32(epsilon), out.reshape(-1, width))
    return out


def activations(x: F32, function: str) -> None:
    """Apply the activation function to x [n, m], in place. One thread, without the interpreter's lock."""
    if function == "relu":
        np.maximum(x, 0, out=x)
    else:
        _activate_all(x, ACTIVATIONS[function])


def gather(rows: Rows, lines: I32, start: int, width: int, out: F32) -> None:
    """Widen elements [start, start + width) of the given lines' rows into out [n, width].

    Single-threaded and without the interpreter's lock: callers divide the work among threads.
    """
    assert out.shape == (lines.shape[0], width)
    _gather(rows.memory, lines, rows.start + start, out, KINDS[rows.codec.name])


def warm(codec: Codec, cache: Codec = FLOAT32) -> None:
    """Compile, or load from the cache, every kernel for weights in `codec` and keys in `cache`."""
    rows = Rows(np.zeros((2, 128), codec.carrier), codec, 0, 128)
    slots = Rows(rows.memory, codec, 0, 64), Rows(rows.memory, codec, 64, 64)
    ids = np.zeros(1, np.int32)
    x, y = np.zeros(64, np.float32), np.zeros(64, np.float32)
    matvec(rows, np.zeros(128, np.float32), 1)
    a = activate(slots[0], ids, ids, x, NO_BIAS, "relu", 1)
    accumulate(slots[1], ids, ids, a, y, 1)
    keys = np.zeros((1, 2, 64), cache.carrier)
    projected, angles = np.zeros(3 * 64, np.float32), x[:32]
    no_bias, scores = np.zeros((0, 0), np.float32), np.zeros((1, 2), np.float32)
    attend(projected, angles, angles, keys, keys, 0, 1.0, no_bias, scores, cache, 1)
    layer_norm(x, x, x, 1e-5)
    activations(np.zeros((1, 64), np.float32), "gelu")
    gather(slots[0], ids, 0, 64, np.zeros((2, 64), np.float32)[:1])


def notes() -> str:
    """What the kernels run on, for people."""
    return f"kernels: numba {numba.__version__}, {threading_layer()} threads"
