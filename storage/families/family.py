"""What one model family's file provides: an architecture, and where every stored tensor comes from.

Tensors are numpy arrays of the carrier type (float32, or uint16 for both 16-bit types); a family
only moves rows around, it never computes with values.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from storage.architecture import MOST_LAYERS, Activation, Architecture
from storage.checkpoint import Checkpoint
from storage.codecs import Carrier
from storage.errors import UnsupportedModel
from storage.layout import Role
from storage.origin import Origin

Settings: TypeAlias = Mapping[str, Any]  # a checkpoint's config.json

ACTIVATIONS: dict[str, Activation] = {
    "relu": "relu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
}


@dataclass(frozen=True, slots=True)
class Source:
    """A tensor of the checkpoint, named below the family's prefix, and the shape it must have.

    Where it is some lines of a larger tensor, that one has `of` lines, and these begin at `start`. The tensor
    may be a stack of `stack` matrices: lines are counted through all of them.
    """

    name: str
    shape: tuple[int, ...]
    start: int = 0
    of: int | None = None
    stack: int | None = None

    @property
    def whole(self) -> tuple[int, ...]:
        """The shape of the checkpoint's tensor."""
        lines = self.shape[0] if self.of is None else self.of
        if self.stack is not None:
            return (self.stack, lines // self.stack, *self.shape[1:])
        return (lines, *self.shape[1:])


@dataclass(frozen=True, slots=True)
class Resident:
    """A resident tensor of the store and how to build it.

    `build` gets the sources' arrays in order and returns an array of `shape`; None copies the only
    source, or, without sources, fills with `fill` (a norm without parameters: ones and zeros).
    """

    name: str
    shape: tuple[int, ...]
    sources: tuple[Source, ...] = ()
    build: Callable[[Sequence[Carrier]], Carrier] | None = None
    fill: float = 0.0

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class Family:
    """One family. Names in `Source` are relative to whichever of `prefixes` a checkpoint uses.

    - `architecture(config)` raises UnsupportedModel for an option that is not supported, and
      CheckpointError never: it sees `config.json` only. `tied_head` is what the config says; the
      tensors decide (`convert`).
    - `resident(config, architecture)` lists the resident tensors in the order they are stored.
    - `ffn(architecture, layer)` has a source for each role: gate and up `[neurons, d_model]`, down
      `[d_model, neurons]`, in the order of `layout.ROLES`.
    - `experts(architecture, layer, expert)` has the same for one expert of a layer with a router, once for
      each form in which checkpoints are published.
    - `published(checkpoint, keep)`, where there is one, gives a checkpoint's tensors under the names that the
      sources have; with `keep` those in few bits stay as they are.
    - `quantised` are the methods, of `quantization_config`, of checkpoints that it reads.
    """

    name: str  # model_type of config.json
    prefixes: tuple[str, ...]
    embedding: str  # the token embedding, relative: a checkpoint's prefix is recognised by it
    architecture: Callable[[Settings], Architecture]
    resident: Callable[[Settings, Architecture], tuple[Resident, ...]]
    ffn: Callable[[Architecture, int], dict[Role, Source]]
    experts: Callable[[Architecture, int, int], tuple[Mapping[Role, Source], ...]] | None = None
    published: Callable[[Checkpoint, bool], Origin] | None = None
    quantised: tuple[str, ...] = ()


def copied(name: str, source: str, *shape: int) -> Resident:
    """A resident tensor that is the checkpoint's, unchanged."""
    return Resident(name, shape, (Source(source, shape),))


def concatenated(name: str, sources: Sequence[Source]) -> Resident:
    """The sources stacked along their first dimension."""
    rows = sum(source.shape[0] for source in sources)
    return Resident(name, (rows, *sources[0].shape[1:]), tuple(sources), np.concatenate)


def norm(name: str, source: str, width: int, *, affine: bool = True) -> tuple[Resident, Resident]:
    """Weight and bias of a layer norm; ones and zeros where it has no parameters."""
    if affine:
        return (
            copied(f"{name}.weight", f"{source}.weight", width),
            copied(f"{name}.bias", f"{source}.bias", width),
        )
    return Resident(f"{name}.weight", (width,), fill=1.0), Resident(f"{name}.bias", (width,))


def number(config: Settings, key: str, default: int | None = None) -> int:
    """A positive integer of `config.json`. Raises UnsupportedModel naming the key."""
    value = config.get(key)
    if value is None:
        value = default
    if type(value) is not int or value <= 0:
        raise UnsupportedModel(f"config.json: {key} must be a positive integer, not {value!r}")
    return value


def layer_count(config: Settings, default: int | None = None) -> int:
    """How many layers there are. Raises UnsupportedModel for more than any model has.

    A description is made of each of them, before a single tensor is looked at.
    """
    value = number(config, "num_hidden_layers", default)
    if value > MOST_LAYERS:
        raise UnsupportedModel(
            f"config.json: num_hidden_layers must be at most {MOST_LAYERS:,}, not {value:,}"
        )
    return value


def count(config: Settings, key: str, default: int) -> int:
    """An integer that may be zero. Raises UnsupportedModel naming the key."""
    value = config.get(key, default)
    if type(value) is not int or value < 0:
        raise UnsupportedModel(f"config.json: {key} must be a whole number, not {value!r}")
    return value


def real(config: Settings, key: str, default: float | None = None) -> float:
    """A positive number of `config.json`. Raises UnsupportedModel naming the key."""
    value = config.get(key)
    if value is None:
        value = default
    if value is None or type(value) not in {int, float} or not 0 < value < math.inf:
        raise UnsupportedModel(f"config.json: {key} must be a positive number, not {value!r}")
    return float(value)


def flag(config: Settings, key: str, default: bool) -> bool:
    """A boolean of `config.json`. Raises UnsupportedModel naming the key."""
    value = config.get(key)
    if value is None:
        value = default
    if type(value) is not bool:
        raise UnsupportedModel(f"config.json: {key} must be true or false, not {value!r}")
    return value


def activation(
    config: Settings, key: str, default: str, among: Mapping[str, Activation] = ACTIVATIONS
) -> Activation:
    """Raises UnsupportedModel naming the activation and those that are supported."""
    value = config.get(key) or default
    try:
        return among[value]
    except (KeyError, TypeError):
        raise UnsupportedModel(
            f"activation {value!r} is not supported; supported are {', '.join(among)}"
        ) from None


def heads(config: Settings, d_model: int, default: int) -> int:
    """Number of query heads. Raises UnsupportedModel unless they divide `d_model`."""
    value = number(config, "num_attention_heads", default)
    if d_model % value:
        raise UnsupportedModel(f"config.json: hidden_size {d_model} is not divisible by {value} heads")
    return value


def token(config: Settings, key: str, default: int | None) -> int | None:
    """A token id or None. Raises UnsupportedModel for anything else."""
    value = config.get(key, default)
    if value is not None and (type(value) is not int or value < 0):
        raise UnsupportedModel(f"config.json: {key} must be a token id, not {value!r}")
    return value


def tokens(config: Settings, key: str, default: int | None) -> tuple[int, ...]:
    """Token ids given as one id, a list or null. Raises UnsupportedModel for anything else."""
    value = config.get(key, default)
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if any(type(item) is not int or item < 0 for item in ids):
        raise UnsupportedModel(f"config.json: {key} must be token ids, not {value!r}")
    return tuple(ids)
