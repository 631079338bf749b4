"""What a model is made of, layer by layer, independent of the family it came from.

Compute runs any `Architecture`; a family's file only has to describe itself in these terms.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeAlias

from storage.records import read_record

Activation: TypeAlias = Literal["relu", "gelu", "gelu_tanh"]

# Where a layer may have a norm. The first two are sub-layers' inputs; the last two are applied to the
# residual stream, after a sub-layer's output has been added to it.
NormPlace: TypeAlias = Literal["attention_input", "ffn_input", "attention_sum", "ffn_sum"]


@dataclass(frozen=True, slots=True)
class Norm:
    """A layer norm with weight and bias."""

    epsilon: float


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary positions of queries and keys: angles `position · base^(-2i / head_dim)`."""

    base: float


@dataclass(frozen=True, slots=True)
class Attention:
    """Query head h uses key-value head h // (heads // kv_heads)."""

    heads: int
    kv_heads: int
    head_dim: int
    scale: float  # of the products of queries and keys
    rope: Rope | None = None
    alibi: bool = False  # a bias of each head's own, linear in the key's position

    @property
    def width(self) -> int:
        """Of all heads' outputs together."""
        return self.heads * self.head_dim

    @property
    def projected(self) -> int:
        """Of queries, keys and values together."""
        return (self.heads + 2 * self.kv_heads) * self.head_dim


@dataclass(frozen=True, slots=True)
class Ffn:
    """Two matrices, `down @ activation(up @ x)`, in `units` units of `width` neurons."""

    kind: Literal["plain"]
    units: int
    width: int
    activation: Activation

    @property
    def neurons(self) -> int:
        return self.units * self.width

    @property
    def sparse(self) -> bool:
        """Whether zero activations are exact and common: then a set of neurons can be enough."""
        return self.activation == "relu"


@dataclass(frozen=True, slots=True)
class Layer:
    """One block. x is the residual stream, A attention, F the FFN, n the norms that there are.

    - in sequence: x = attention_sum(x + A(attention_input(x))); x = ffn_sum(x + F(ffn_input(x)))
    - `parallel`:  x += A(attention_input(x)) + F(ffn_input(x)), where without an `ffn_input` of its own the
      FFN reads attention's input
    """

    attention: Attention
    ffn: Ffn
    norms: dict[NormPlace, Norm]
    parallel: bool = False


@dataclass(frozen=True, slots=True)
class Architecture:
    """A decoder-only transformer."""

    family: str
    d_model: int
    vocabulary: int
    max_positions: int  # longest context, in tokens
    layers: tuple[Layer, ...]
    final_norm: Norm | None
    tied_head: bool  # the head is the token embedding
    embed_dim: int  # width of the token embedding; != d_model means project_in and project_out
    learned_positions: int | None  # the row of position 0 in a table of learned positions; None: no table
    bos_token: int | None
    eos_tokens: tuple[int, ...]

    @property
    def sparse(self) -> bool:
        """Whether every FFN is: then predicted sets make sense, and `oracle` equals `all`."""
        return all(layer.ffn.sparse for layer in self.layers)

    @property
    def activation(self) -> str:
        """The activations of the FFNs, for people."""
        return ", ".join(sorted({layer.ffn.activation for layer in self.layers}))

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Architecture:
        """Inverse of `to_json`. Raises ValueError for fields that are missing, unknown or of another type."""
        return read_record(cls, data)


# Canonical names of the resident tensors in a store. Linear weights are [out, in].
EMBED = "embed.weight"  # [vocabulary, embed_dim]
POSITIONS = "positions.weight"  # [max_positions + learned_positions, d_model]
PROJECT_IN = "project_in.weight"  # [d_model, embed_dim]; embed_dim != d_model only
PROJECT_OUT = "project_out.weight"  # [embed_dim, d_model]
FINAL_NORM = "final_norm"  # .weight, .bias [d_model]
HEAD = "head.weight"  # [vocabulary, embed_dim]; untied only

NORM_PARTS: dict[NormPlace, str] = {  # no layer has both norms of a name
    "attention_input": "norm",
    "attention_sum": "norm",
    "ffn_input": "ffn_norm",
    "ffn_sum": "ffn_norm",
}


def layer(index: int, part: str) -> str:
    """Name of a layer's tensor.

    Parts: `norm.weight|bias` [d_model], `qkv.weight` [(heads + 2 kv_heads) head_dim, d_model] (all
    queries, then all keys, then all values), `qkv.bias`, `out.weight` [d_model, heads head_dim],
    `out.bias`, `ffn_norm.weight|bias`, `up.bias` [neurons], `down.bias` [d_model]. Biases that a
    checkpoint lacks are absent. The up and down matrices are the bundles.
    """
    return f"layers.{index}.{part}"
