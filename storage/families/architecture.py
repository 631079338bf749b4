"""What a model is made of, independent of the family it came from.

Compute runs any `Architecture`; a family's file only has to describe itself in these terms.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

Block = Literal["pre_norm", "post_norm", "parallel"]
Positions = Literal["learned", "rotary", "alibi"]
Activation = Literal["relu", "gelu", "gelu_tanh"]


@dataclass(frozen=True, slots=True)
class Architecture:
    """A decoder-only transformer with a two-matrix FFN.

    Blocks (x is the residual stream, A attention, F the FFN):

    - `pre_norm`:  x += A(norm(x));      x += F(ffn_norm(x))
    - `post_norm`: x = norm(x + A(x));   x = ffn_norm(x + F(x))       (opt-350m)
    - `parallel`:  x += A(norm(x)) + F(ffn_norm(x)); `shared_norm` says that both norms are one
      (falcon-7b), and then the store has no `ffn.norm`.

    Query head h uses key-value head h // (heads // kv_heads).
    """

    family: str
    d_model: int
    d_ff: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    max_positions: int  # longest context, in tokens
    block: Block
    positions: Positions
    activation: Activation
    shared_norm: bool  # parallel blocks only: attention and FFN read the same normed input
    final_norm: bool
    tied_head: bool  # the head is the token embedding
    norm_epsilon: float
    embed_dim: int  # width of the token embedding; != d_model means project_in / project_out
    position_offset: int  # learned positions: row of position 0 (OPT: 2)
    rotary_base: float
    bos_token: int | None
    eos_tokens: tuple[int, ...]

    @property
    def relu(self) -> bool:
        """Whether zero activations are exact, so that `oracle` equals `all`."""
        return self.activation == "relu"

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Architecture:
        """Inverse of `to_json`. Raises KeyError for a missing field; ignores none."""
        known = {field.name for field in fields(cls)}
        unknown = set(data) - known
        if unknown:
            raise KeyError(f"unknown architecture fields: {sorted(unknown)}")
        return cls(**{**data, "eos_tokens": tuple(data["eos_tokens"])})


# Canonical names of the resident tensors in a store. Linear weights are [out, in].
EMBED = "embed.weight"  # [vocabulary, embed_dim]
POSITIONS = "positions.weight"  # [max_positions + position_offset, d_model]; learned positions only
PROJECT_IN = "project_in.weight"  # [d_model, embed_dim]; embed_dim != d_model only
PROJECT_OUT = "project_out.weight"  # [embed_dim, d_model]
FINAL_NORM = "final_norm"  # .weight, .bias [d_model]
HEAD = "head.weight"  # [vocabulary, embed_dim]; untied only


def layer(index: int, part: str) -> str:
    """Name of a layer's tensor.

    Parts: `norm.weight|bias` [d_model], `qkv.weight` [(heads + 2 kv_heads) head_dim, d_model] (all
    queries, then all keys, then all values), `qkv.bias`, `out.weight` [d_model, heads head_dim],
    `out.bias`, `ffn_norm.weight|bias`, `up.bias` [d_ff], `down.bias` [d_model]. Biases that a
    checkpoint lacks are absent. The up and down matrices are the bundles.
    """
    return f"layers.{index}.{part}"
