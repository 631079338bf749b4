"""Making kernels ready before they are needed."""

from __future__ import annotations

from typing import Literal

import numpy as np

from storage.architecture import Architecture, Attention, Ffn, Router
from storage.codecs import FLOAT16, Codec
from storage.layout import ROLES, Rows
from workers.kernels.attention import Around, Attending
from workers.kernels.dense import NO_BIAS, matvec, matvecs
from workers.kernels.experts import add_weighted, outputs
from workers.kernels.feeding import Feeding
from workers.kernels.ffn import accumulate, activate, activate_gated
from workers.kernels.functions import activations
from workers.kernels.launch import start_threads
from workers.kernels.lowrank import passing, score
from workers.kernels.norms import layer_norm, rms_norm
from workers.kernels.panels import combine, in_panels, multiply, new_panels, out_of_panels
from workers.kernels.routing import choose

_WIDTH = 128  # of rows: every format can have them


def warm(codec: Codec, architecture: Architecture | None = None) -> None:
    """Compile, or load from the cache, the kernels for weights in `codec`, but for attention's.

    Those that `architecture` uses; without one, those of plain FFNs and layer norms.
    """
    start_threads(1)
    layers = () if architecture is None else architecture.layers
    kinds = {layer.ffn.kind for layer in layers} or {"plain"}
    norms = {norm.kind for layer in layers for norm in layer.norms.values()} or {"layer"}
    if any(layer.attention.qk_norm for layer in layers):
        norms.add("rms")
    row = codec.elements(_WIDTH)
    memory = np.zeros((2, 3 * row), codec.carrier)
    up, down, gate = (Rows(memory, codec, start, _WIDTH) for start in (0, row, 2 * row))
    ids = np.zeros(1, np.int32)
    x, y = np.zeros(_WIDTH, np.float32), np.zeros(_WIDTH, np.float32)
    matrix, vector = Rows.of_matrix(memory, codec), np.zeros(3 * _WIDTH, np.float32)
    matvec(matrix, vector, 1)
    if any(layer.ffn.router for layer in layers):
        matvecs(matrix, vector[None], 1)
    a = np.zeros(1, np.float32)
    if "plain" in kinds:
        activate(up, ids, ids, x, NO_BIAS, "relu", 1, a)
    if "gated" in kinds:
        activate_gated(gate, up, ids, ids, x, (NO_BIAS, NO_BIAS), Ffn("gated", 1, 1, "silu"), 1, a)
    accumulate(down, ids, ids, a, y, 1)
    if any(layer.ffn.width > 1 and not layer.ffn.router for layer in layers):
        accumulate(Rows(memory.reshape(1, -1), codec, 0, _WIDTH, 2), ids, ids, x, y[:2], 1)
    panels = in_panels(x[None])
    multiply(up, ids, panels, new_panels(1, 1))
    if any(layer.ffn.width == 1 and not layer.ffn.router for layer in layers) or not layers:
        combine(down, ids, slice(0, _WIDTH), new_panels(1, 1), panels)
    out_of_panels(panels, x[None])
    out_of_panels(panels, np.zeros((1, 3 * _WIDTH), np.float32)[:, :_WIDTH])  # to numba another type
    if "layer" in norms:
        layer_norm(x, x, x, 1e-5)
    if "rms" in norms:
        rms_norm(x, x, 0, 1e-5)
    activations(np.zeros((1, 64), np.float32), "gelu")


def warm_feeding(*codecs: Codec) -> None:
    """The same for the launch over all units of a layer without experts, whose rows have these codecs."""
    kind: Literal["plain", "gated"] = "plain" if len(codecs) == 2 else "gated"
    rows: dict[str, Rows] = {
        role: Rows(np.zeros((1, codec.elements(_WIDTH)), codec.carrier), codec, 0, _WIDTH)
        for role, codec in zip(ROLES[kind], codecs, strict=True)
    }
    ids, x = np.zeros(1, np.int32), np.zeros(_WIDTH, np.float32)
    feeding = Feeding(rows, (NO_BIAS, NO_BIAS), Ffn(kind, 1, 1, "relu"), 1)
    feeding(ids, ids, x, np.zeros(1, np.float32), np.zeros(_WIDTH, np.float32))


def warm_experts(gate: Codec, up: Codec, down: Codec) -> None:
    """The same for a mixture's experts, whose rows have these codecs, and its routers."""
    ids, x = np.zeros(1, np.int32), np.zeros(_WIDTH, np.float32)
    gates, ups, downs = (
        Rows(np.zeros((1, _WIDTH * codec.elements(_WIDTH)), codec.carrier), codec, 0, _WIDTH, _WIDTH)
        for codec in (gate, up, down)
    )
    found = outputs((gates, ups, downs), ids, ids, x, (NO_BIAS, NO_BIAS), Ffn("gated", 1, _WIDTH, "silu"), 1)
    add_weighted(found, ids, x[:1], x)
    choose(Router(1), x[None])


def warm_attention(qkv: Codec, out: Codec, cache: Codec, router: Codec) -> None:
    """The same for attention, with its matrices in these codecs, keys and values in `cache`.

    `router` is that of the layers' routers, float32 without any.
    """
    attention = Attention(heads=2, kv_heads=1, head_dim=_WIDTH // 2, scale=1.0)
    qkv_rows, out_rows = (
        Rows.of_matrix(np.zeros((lines, codec.elements(_WIDTH)), codec.carrier), codec)
        for lines, codec in ((2 * _WIDTH, qkv), (_WIDTH, out))
    )
    angles, no_bias = np.zeros((1, 0), np.float32), np.zeros((0, 0), np.float32)
    keys = np.zeros((1, 1, _WIDTH // 2), cache.carrier)
    attending = Attending(
        attention,
        qkv_rows,
        NO_BIAS,
        out_rows,
        NO_BIAS,
        (NO_BIAS, NO_BIAS, NO_BIAS, NO_BIAS),
        (angles, angles),
        no_bias,
        (keys, keys),
        cache,
        np.zeros((2, 1), np.float32),
        1,
        around=Around(router=Rows.of_matrix(np.zeros((1, router.elements(_WIDTH)), router.carrier), router)),
    )
    attending(np.zeros(_WIDTH, np.float32), 0)


def warm_scores() -> None:
    """The same for trained predictors."""
    down, up = np.zeros((4, _WIDTH), np.uint16), np.zeros((4, 8), np.uint16)
    y = np.zeros(8, np.float32)
    score(FLOAT16, down, up, np.zeros(_WIDTH, np.float32), np.float32(1), np.zeros(8, np.float32), y)
    passing(y, 0.0, 1.0, np.zeros(8, np.intp))
