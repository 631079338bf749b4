"""Attention of one token: rotate it, keep its keys and values, attend to all that are kept.

With its projections it is one launch (`Attending`), whose stages are the product that makes queries, keys and
values, their keeping, the heads, and the product that makes the output. Where the block allows, the launch
begins with the norm before it, and goes on to the residual stream, the FFN's norm and the router's product.
`attend` is what lies between the products alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
from numba import njit, prange

from storage.architecture import Attention, Norm
from storage.codecs import F32, FLOAT32, Carrier, Codec
from storage.layout import Rows
from workers.kernels.codecs import scalars
from workers.kernels.dense import share_of_product
from workers.kernels.launch import FAST, chunks_of, rows_ahead, stages, take, tell, use_threads, wait
from workers.kernels.norms import norm_layer, norm_rms
from workers.kernels.rows import add_four, add_one, dots, four, loops

Placed: TypeAlias = "tuple[Norm | None, F32, F32]"  # a norm, its weight and its bias, or none and no numbers

_NOTHING = np.zeros(0, np.float32)
_NO_NORM: Placed = (None, _NOTHING, _NOTHING)
_NO_ROUTER = Rows.of_matrix(np.zeros((0, 1), np.float32), FLOAT32)
_NORMS = {"rms": 1, "layer": 2}  # 0: there is none
_PROJECTED, _KEPT, _MIXED, _OUT, _ADDED, _ROUTED = range(6)  # stages


@njit(fastmath=FAST, cache=True, nogil=True)
def _rotate(vectors: Any, cos: Any, sin: Any) -> None:
    half = cos.shape[0]
    for i in range(vectors.shape[0]):
        for j in range(half):
            low, high = vectors[i, j], vectors[i, half + j]
            vectors[i, j] = low * cos[j] - high * sin[j]
            vectors[i, half + j] = high * cos[j] + low * sin[j]


@njit(cache=True, nogil=True)
def put(codec: Any, vectors: Any, position: Any, cache: Any) -> None:
    """Round `vectors` [heads, head_dim] into row `position` of `cache` [heads, context, head_dim]."""
    for head in range(vectors.shape[0]):
        row = cache[head, position]
        for j in range(row.shape[0]):
            row[j] = codec.narrow(vectors[head, j])


@njit(nogil=True)
def _norm(norm: Any, x: Any, weight: Any, bias: Any, out: Any) -> None:
    """The norm of x, which may be `out`."""
    kind, offset, epsilon = norm
    if kind == 1:
        norm_rms(x, weight, offset, epsilon, out)
    elif kind == 2:
        norm_layer(x, weight, bias, epsilon, out)
    else:
        out[:] = x


@njit(nogil=True)
def _add_share(x: Any, share: Any, y: Any) -> None:
    """y = x + share · y, rounded twice as numpy does: in one loop the two would become one operation."""
    for j in range(y.shape[0]):
        y[j] *= share
    for j in range(y.shape[0]):
        y[j] += x[j]


@njit(nogil=True)
def _norm_each(norm: Any, vectors: Any, width: Any, weight: Any, bias: Any) -> None:
    """The norm of every `width` values, in place."""
    for start in range(0, vectors.shape[0], width):
        some = vectors[start : start + width]
        _norm(norm, some, weight, bias, some)


@njit(nogil=True)
def _keep(
    codec: Any, projected: Any, heads: Any, cos: Any, sin: Any, keys: Any, values: Any, position: Any
) -> None:
    """Rotate queries and keys, and put the token's keys and values where they stay."""
    vectors = projected.reshape(-1, keys.shape[2])
    shared = heads + keys.shape[0]
    _rotate(vectors[:shared], cos, sin)
    put(codec, vectors[heads:shared], position, keys)
    put(codec, vectors[shared:], position, values)


@njit(fastmath=FAST, nogil=True)
def _share_of_heads(
    progress: Any,
    stage: Any,
    codec: Any,
    projected: Any,
    keys: Any,
    values: Any,
    first: Any,
    length: Any,
    scale: Any,
    softcap: Any,
    bias: Any,
    sinks: Any,
    scores: Any,
    out: Any,
) -> None:
    """A thread's share of a stage: heads that attend to the tokens first … length."""
    heads, width = scores.shape[0], keys.shape[2]
    group = heads // keys.shape[0]
    biased, sunk = bias.shape[0] > 0, sinks.shape[0] > 0
    last = length - 1
    while True:
        head = take(progress, stage)
        if head >= heads:
            break
        shared = head // group
        query, score = projected[head * width : (head + 1) * width], scores[head]
        key, value = keys[shared], values[shared]
        for t in range(first, length, 4):  # as in dense.py
            t0, t1, t2, t3 = four(t, last)
            n0, n1, n2, n3 = four(t + 4, last)
            rows, following = (key[t0], key[t1], key[t2], key[t3]), (key[n0], key[n1], key[n2], key[n3])
            s0, s1, s2, s3 = dots(codec, rows, following, query)
            score[t0] = s0
            score[t1] = s1
            score[t2] = s2
            score[t3] = s3
        if softcap > np.float32(0):
            for t in range(first, length):
                score[t] = np.float32(math.tanh(score[t] * scale / softcap))
        highest = sinks[head] if sunk else np.float32(-np.inf)
        factor = softcap if softcap > np.float32(0) else scale
        for t in range(first, length):
            score[t] *= factor
            if biased:
                score[t] += bias[head, t]
            highest = max(highest, score[t])
        total = np.float32(math.exp(sinks[head] - highest)) if sunk else np.float32(0)
        for t in range(first, length):
            score[t] = np.float32(math.exp(score[t] - highest))
            total += score[t]
        result = out[head * width : (head + 1) * width]
        for j in range(width):
            result[j] = np.float32(0)
        whole = first + (length - first) // 4 * 4
        for t in range(first, whole, 4):
            add_four(codec, result, score[t : t + 4], value[t], value[t + 1], value[t + 2], value[t + 3])
        for t in range(whole, length):
            add_one(codec, result, score[t], value[t])
        for j in range(width):
            result[j] /= total
        tell(progress, stage)


@njit(parallel=True, fastmath=FAST, cache=True, nogil=True)
def _attend(
    codec: Any,
    projected: Any,
    cos: Any,
    sin: Any,
    keys: Any,
    values: Any,
    position: Any,
    window: Any,
    scale: Any,
    softcap: Any,
    bias: Any,
    sinks: Any,
    scores: Any,
    out: Any,
    threads: Any,
) -> None:
    _keep(codec, projected, scores.shape[0], cos, sin, keys, values, position)
    length = position + 1
    first = max(0, length - window)
    progress = stages(1)
    for _ in prange(threads):
        _share_of_heads(
            progress,
            0,
            codec,
            projected,
            keys,
            values,
            first,
            length,
            scale,
            softcap,
            bias,
            sinks,
            scores,
            out,
        )


@njit(parallel=True, fastmath=FAST, cache=True, nogil=True)
def _project_and_attend(
    qkv: Any,
    qkv_memory: Any,
    qkv_place: Any,
    qkv_bias: Any,
    out: Any,
    out_memory: Any,
    out_place: Any,
    out_bias: Any,
    norm: Any,
    norm_width: Any,
    q_weight: Any,
    q_bias: Any,
    k_weight: Any,
    k_bias: Any,
    codec: Any,
    keys: Any,
    values: Any,
    cosines: Any,
    sines: Any,
    window: Any,
    scale: Any,
    softcap: Any,
    bias: Any,
    sinks: Any,
    scores: Any,
    before: Any,
    before_weight: Any,
    before_bias: Any,
    after: Any,
    after_weight: Any,
    after_bias: Any,
    share: Any,
    router: Any,
    router_memory: Any,
    router_place: Any,
    router_bias: Any,
    x: Any,
    position: Any,
    y: Any,
    fed: Any,
    logits: Any,
    threads: Any,
) -> None:
    qkv_first, qkv_step, qkv_ahead = qkv_place
    out_first, out_step, out_ahead = out_place
    router_first, router_step, router_ahead = router_place
    norm_kind, _, _ = norm
    heads, width = scores.shape[0], keys.shape[2]
    queried, known = heads * width, (heads + keys.shape[0]) * width
    projected = np.empty(known + keys.shape[0] * width, np.float32)
    mixed = np.empty(queried, np.float32)
    length = position + 1
    first = max(0, length - window)
    seen = np.empty(x.shape[0], np.float32)
    _norm(before, x, before_weight, before_bias, seen)
    given = qkv.prepare(seen)
    progress = stages(6)
    for _ in prange(threads):
        share_of_product(
            progress, _PROJECTED, qkv, qkv_memory, qkv_first, qkv_step, given, qkv_bias, projected, qkv_ahead
        )
        wait(progress, _PROJECTED, chunks_of(projected.shape[0]))
        if take(progress, _KEPT) == 0:
            if norm_kind:
                own, q, k = norm_width, projected[:queried], projected[queried:known]
                _norm_each(norm, q, own or queried, q_weight, q_bias)
                _norm_each(norm, k, own or known - queried, k_weight, k_bias)
            _keep(codec, projected, heads, cosines[position], sines[position], keys, values, position)
            tell(progress, _KEPT)
        wait(progress, _KEPT, 1)
        _share_of_heads(
            progress,
            _MIXED,
            codec,
            projected,
            keys,
            values,
            first,
            length,
            scale,
            softcap,
            bias,
            sinks,
            scores,
            mixed,
        )
        wait(progress, _MIXED, heads)
        share_of_product(
            progress,
            _OUT,
            out,
            out_memory,
            out_first,
            out_step,
            out.prepare(mixed),
            out_bias,
            y,
            out_ahead,
        )
        if fed.shape[0] > 0:
            wait(progress, _OUT, chunks_of(y.shape[0]))
            if take(progress, _ADDED) == 0:
                _add_share(x, share, y)
                _norm(after, y, after_weight, after_bias, fed)
                tell(progress, _ADDED)
            if logits.shape[0] > 0:
                wait(progress, _ADDED, 1)
                share_of_product(
                    progress,
                    _ROUTED,
                    router,
                    router_memory,
                    router_first,
                    router_step,
                    router.prepare(fed),
                    router_bias,
                    logits,
                    router_ahead,
                )


_launch: Any = _project_and_attend  # called with tuples of what does not change


@dataclass(frozen=True, slots=True)
class Around:
    """What a block does with one token before and behind attention, up to its FFN."""

    before: Placed = _NO_NORM  # of attention's input
    after: Placed = _NO_NORM  # of the FFN's input
    share: float = 1.0  # of attention's output that is added to the residual stream
    router: Rows = field(default=_NO_ROUTER)  # no rows: none
    router_bias: F32 = field(default_factory=lambda: _NOTHING)


class Attending:
    """One layer's attention with its projections, all that it needs looked up once."""

    def __init__(
        self,
        attention: Attention,
        qkv: Rows,
        qkv_bias: F32,
        out: Rows,
        out_bias: F32,
        norms: tuple[F32, F32, F32, F32],
        angles: tuple[F32, F32],
        bias: F32,
        cache: tuple[Carrier, Carrier],
        codec: Codec,
        scores: F32,
        threads: int,
        sinks: F32 = _NOTHING,
        around: Around | None = None,
    ) -> None:
        """`norms`: weights and biases of the queries' norm and of the keys', empty where there is none.

        `angles`: cos and sin of every position, as `attend` takes one's; `cache`: keys and values, in the
        carrier of `codec`; bias, scores and sinks as for `attend`. `around`: for `onward`.
        """
        norm = None if attention.qk_norm is None else attention.qk_norm.norm
        whole = attention.qk_norm is not None and attention.qk_norm.over == "whole"
        keys, values = cache
        around = around or Around()
        self._token_bytes = 2 * attention.heads * attention.head_dim * keys.itemsize
        self._weight_bytes = qkv.memory.nbytes + out.memory.nbytes
        self._window = attention.window or keys.shape[1]
        self._width = out.memory.shape[0]
        self._experts = around.router.memory.shape[0]
        self._threads = threads
        bound = (
            *_matrix(qkv),
            qkv_bias,
            *_matrix(out),
            out_bias,
            _described(norm),
            0 if whole else attention.head_dim,
            *norms,
            scalars(codec),
            keys,
            values,
            *angles,
            self._window,
            np.float32(attention.scale),
            np.float32(attention.softcap or 0),
            bias,
            sinks,
            scores,
        )
        self._alone = (*bound, *_bound(Around(router=around.router)))
        self._onward = (*bound, *_bound(around))

    def __call__(self, x: F32, position: int) -> F32:
        """Attention's output [d_model] for the token at `position`, from its input x [d_model]."""
        return self._launch(self._alone, x, position, _NOTHING, _NOTHING)

    def onward(self, x: F32, position: int) -> tuple[F32, F32, F32]:
        """What a block does up to its FFN, from the residual stream x [d_model].

        Returns the residual stream behind attention and the FFN's input, both [d_model], and the router's
        logits [experts].
        """
        fed, logits = np.empty(self._width, np.float32), np.empty(self._experts, np.float32)
        return self._launch(self._onward, x, position, fed, logits), fed, logits

    def _launch(self, bound: tuple[Any, ...], x: F32, position: int, fed: F32, logits: F32) -> F32:
        y = np.empty(self._width, np.float32)
        seen = min(position + 1, self._window)
        launched = use_threads(self._threads, self._weight_bytes + seen * self._token_bytes)
        _launch(*bound, x, position, y, fed, logits, launched)
        return y


def _bound(around: Around) -> tuple[Any, ...]:
    """As compiled code takes it."""
    before, after = around.before, around.after
    return (
        _described(before[0]),
        *before[1:],
        _described(after[0]),
        *after[1:],
        np.float32(around.share),
        *_matrix(around.router),
        around.router_bias,
    )


def _matrix(rows: Rows) -> tuple[Any, Carrier, tuple[int, int, int]]:
    """A matrix as compiled code takes it: codec, flat memory, and where its rows lie."""
    ahead = rows_ahead(rows.elements * rows.memory.itemsize)
    return loops(rows.codec), rows.memory.reshape(-1), (rows.start, rows.memory.shape[1], ahead)


def _described(norm: Norm | None) -> tuple[int, np.float32, np.float32]:
    """A norm's kind, offset and epsilon."""
    if norm is None:
        return 0, np.float32(0), np.float32(0)
    return _NORMS[norm.kind], np.float32(norm.offset), np.float32(norm.epsilon)


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
    window: int | None = None,
    softcap: float | None = None,
    sinks: F32 = _NOTHING,
) -> F32:
    """Attention of the token at `position`; returns [heads · head_dim].

    projected [(heads + 2 · kv_heads) · head_dim]: its queries, keys and values, of which the first two
    are rotated in place by cos and sin, one for each pair of a head's first values: [head_dim / 2], or fewer,
    or none. Keys and values go into the caches, [kv_heads, context, head_dim] of `codec`'s carrier, before
    they are attended to; the token sees the last `window` of them, or all. Products are multiplied by
    `scale`, and then s becomes softcap · tanh(s / softcap) where there is one; bias [heads, context] is
    added to them, or has no rows; scores [heads, context] is scratch. Sinks [heads], where there are any, are
    one more score of each head, whose share is lost.
    """
    heads, width = scores.shape[0], keys.shape[2]
    out = np.empty(heads * width, np.float32)
    seen = position + 1 if window is None else window
    launched = use_threads(threads, heads * min(position + 1, seen) * width * 2 * keys.itemsize)
    numbers, factor, cap = scalars(codec), np.float32(scale), np.float32(softcap or 0)
    _attend(
        numbers,
        projected,
        cos,
        sin,
        keys,
        values,
        position,
        seen,
        factor,
        cap,
        bias,
        sinks,
        scores,
        out,
        launched,
    )
    return out
