"""The dial of a model without zeros: which neurons get their true rows at each quality. `dial.safetensors`.

`run.py calibrate` measures it and writes it into the store. At every token a neuron of a layer has a score,
made from the low-bit copy of its rows: `|a - centre| * norm`, where `a` is its activation, `centre` its usual
one (zero but where the others get that, see `Others`) and `norm` the length of its down row. Neurons whose
score exceeds the layer's threshold are chosen. docs/dial.md tells what each point costs.

One safetensors file, bound to its store as predictors are. Tensors, float32, of layer i and of every point:
`layers.i.norm`, `layers.i.centre` [neurons], `layers.i.bias` [d_model] (the sum of centre · down row),
`POINT.threshold` and `POINT.guess` [layers]; minus infinity chooses all neurons, infinity none. The metadata
hold the store's identity and the rest of `Dial` as JSON.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Literal, TypeAlias

import numpy as np

from storage import files
from storage.codecs import F32
from storage.errors import StoreError, reason
from storage.header import header_bytes
from storage.layout import Role
from storage.records import read_record
from storage.store import Store
from storage.tensors import Tensors

DIAL = "dial.safetensors"
VERSION = 1

# What neurons that are not chosen add to the FFN's output: their low-bit rows, their mean, or nothing.
Others: TypeAlias = Literal["low", "mean", "nothing"]


@dataclass(frozen=True, slots=True)
class Text:
    """What something was measured on."""

    name: str
    tokens: int


@dataclass(frozen=True, slots=True)
class DialPoint:
    """One quality, with what it costs beside the exact model on the held-out text. Intervals are of 95 %."""

    name: str
    others: Others
    reads: tuple[Role, ...]  # of a chosen neuron, true rows; its activation is the copy's without gate and up
    perplexity: float  # its change: 0.01 is one per cent more
    perplexity_low: float
    perplexity_high: float
    divergence_mean: float  # Kullback–Leibler, nats a token
    divergence_p99: float
    agreement: float  # share of tokens whose likeliest next token is the same
    share: float  # of the neurons, chosen for a token
    bytes_per_token: float  # of the rows of chosen neurons, none of them cached
    memory: int  # bytes of the low-bit rows that this point needs


@dataclass(frozen=True, slots=True)
class DialLayer:
    """What scores of one layer are made with."""

    norm: F32  # [neurons]
    centre: F32  # [neurons]
    bias: F32  # [d_model]


@dataclass(frozen=True, slots=True)
class Thresholds:
    """Of one point, for each layer: what a score must exceed."""

    threshold: F32  # [layers]; of the activations from the FFN's own input
    guess: F32  # [layers]; of those from what is announced before attention, for reads that start early


@dataclass(frozen=True, slots=True)
class _Described:
    """What the metadata hold."""

    version: int
    shadow: dict[str, str]
    calibration: Text
    held_out: Text
    default: str
    points: tuple[DialPoint, ...]


@dataclass(frozen=True, slots=True)
class Dial:
    """All points of a store and of one low-bit copy of its rows."""

    shadow: dict[str, str]  # from a role to the codec of its low-bit copy
    calibration: Text
    held_out: Text
    default: str  # a point's name, or `exact`
    points: tuple[DialPoint, ...]
    layers: tuple[DialLayer, ...]
    thresholds: Mapping[str, Thresholds]  # by the point's name


def read_dial(store: Store) -> Dial | None:
    """None where the store has none. Raises StoreError for a damaged one, and for another store's."""
    path = store.path / DIAL
    if not path.is_file():
        return None
    file = Tensors(path)
    if file.metadata.get("store") != store.identity:
        raise StoreError(f"{path} belongs to another store; calibrate this one")
    try:
        found = read_record(_Described, json.loads(file.metadata.get("dial", "")))
    except (ValueError, RecursionError) as error:
        raise StoreError(f"{path} is damaged: its description cannot be read") from error
    if found.version != VERSION:
        raise StoreError(f"{path} has version {found.version}, which this flashring does not read")
    architecture, count = store.architecture, (len(store.architecture.layers),)
    layers = []
    for index, layer in enumerate(architecture.layers):
        neurons = (layer.ffn.neurons,)
        norm, centre = (file.vector(f"layers.{index}.{part}", neurons) for part in ("norm", "centre"))
        layers.append(DialLayer(norm, centre, file.vector(f"layers.{index}.bias", (architecture.d_model,))))
    thresholds = {
        point.name: Thresholds(
            file.vector(f"{point.name}.threshold", count), file.vector(f"{point.name}.guess", count)
        )
        for point in found.points
    }
    if found.default != "exact" and found.default not in thresholds:
        raise StoreError(f"{path} is damaged: its default {found.default!r} is none of its points")
    return Dial(
        found.shadow,
        found.calibration,
        found.held_out,
        found.default,
        found.points,
        tuple(layers),
        thresholds,
    )


def write_dial(store: Store, dial: Dial) -> None:
    """Raises StoreError for a store that cannot be written."""
    tensors: dict[str, F32] = {}
    for index, layer in enumerate(dial.layers):
        for part in ("norm", "centre", "bias"):
            tensors[f"layers.{index}.{part}"] = getattr(layer, part)
    for name, point in dial.thresholds.items():
        tensors |= {f"{name}.threshold": point.threshold, f"{name}.guess": point.guess}
    described = _Described(VERSION, dial.shadow, dial.calibration, dial.held_out, dial.default, dial.points)
    metadata = {"store": store.identity, "dial": json.dumps(asdict(described))}
    header = header_bytes([(name, "float32", one.shape) for name, one in tensors.items()], metadata)
    data = b"".join([header, *(np.ascontiguousarray(one, "<f4").tobytes() for one in tensors.values())])
    try:
        files.write_whole(store.path / DIAL, data, shared=True)
    except OSError as error:
        raise StoreError(f"{store.path / DIAL} cannot be written: {reason(error)}") from error
