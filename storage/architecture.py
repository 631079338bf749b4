"""What a model is made of, layer by layer, independent of the family it came from.

Compute runs any `Architecture`; a family's file only has to describe itself in these terms.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeAlias

from storage.layout import Role
from storage.records import read_record

MOST_LAYERS = 4096  # published models have up to 126; what says more is damaged, or an attack

Activation: TypeAlias = Literal["relu", "fatrelu", "gelu", "gelu_tanh", "silu", "clamped_silu"]

# Where a layer may have a norm: of a sub-layer's input, of its output before that is added to the residual
# stream, or of the stream after it has been added.
NormPlace: TypeAlias = Literal[
    "attention_input", "ffn_input", "attention_output", "ffn_output", "attention_sum", "ffn_sum"
]


@dataclass(frozen=True, slots=True)
class Norm:
    """`layer`: mean and variance, with weight and bias. `rms`: the root mean square, with a weight alone."""

    epsilon: float
    kind: Literal["layer", "rms"] = "layer"
    offset: Literal[0, 1] = 0  # added to the stored weight; rms only


@dataclass(frozen=True, slots=True)
class LinearScaling:
    """Every position counts `1 / factor`."""

    factor: float
    kind: Literal["linear"] = "linear"


@dataclass(frozen=True, slots=True)
class Llama3Scaling:
    """`factor` for wavelengths above `original / low`, none below `original / high`, a ramp between."""

    factor: float
    low: float
    high: float
    original: int  # context that the model was trained with at first, in tokens
    kind: Literal["llama3"] = "llama3"


@dataclass(frozen=True, slots=True)
class YarnScaling:
    """arXiv 2309.00071: no scaling above `fast` turns in the original context, `factor` below `slow`."""

    factor: float
    original: int
    fast: float
    slow: float
    truncate: bool  # the ramp begins and ends at whole dimensions
    magnitude: float  # of cosines and sines
    kind: Literal["yarn"] = "yarn"


@dataclass(frozen=True, slots=True)
class LongropeScaling:
    """A factor of its own for each angle, `short` in contexts up to `original` and `long` in longer ones.

    The context is the one that keys and values are kept for, so that a text's keys are all of one kind.
    """

    short: tuple[float, ...]
    long: tuple[float, ...]
    original: int
    magnitude: float  # of cosines and sines
    kind: Literal["longrope"] = "longrope"


Scaling: TypeAlias = LinearScaling | Llama3Scaling | YarnScaling | LongropeScaling


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary positions of queries and keys: angles `position · base^(-2i / dims)`, halves paired."""

    base: float
    dims: int | None = None  # how many of a head's first values are rotated; None: all
    scaling: Scaling | None = None


@dataclass(frozen=True, slots=True)
class QkNorm:
    """A norm of queries and keys before they are rotated: of each head, or of all heads together."""

    norm: Norm
    over: Literal["head", "whole"]


@dataclass(frozen=True, slots=True)
class Attention:
    """Query head h uses key-value head h // (heads // kv_heads)."""

    heads: int
    kv_heads: int
    head_dim: int
    scale: float  # of the products of queries and keys
    rope: Rope | None = None
    alibi: bool = False  # a bias of each head's own, linear in the key's position
    window: int | None = None  # tokens that a token sees, itself among them; None: all before it
    softcap: float | None = None  # c: scores s become c · tanh(s / c)
    qk_norm: QkNorm | None = None
    sinks: bool = False  # each head has one more score, which no key has made and no value answers to

    @property
    def width(self) -> int:
        """Of all heads' outputs together."""
        return self.heads * self.head_dim

    @property
    def projected(self) -> int:
        """Of queries, keys and values together."""
        return (self.heads + 2 * self.kv_heads) * self.head_dim


@dataclass(frozen=True, slots=True)
class Router:
    """Which of a layer's experts a token has, and how much each counts.

    One logit an expert, `weight @ x`, plus a bias where the layer has one. The `top_k` largest are the
    token's experts; of equal ones the lower id.
    """

    top_k: int
    scores: Literal["softmax", "sigmoid"] = "softmax"  # what makes weights of logits
    over: Literal["all", "chosen"] = "all"  # the logits that softmax goes over
    renormalise: bool = False  # the chosen experts' weights are divided by their sum
    scale: float = 1.0  # of the weights, at last
    reads: Literal["ffn_input", "layer_input"] = "ffn_input"  # layer_input: x before attention and its norm


@dataclass(frozen=True, slots=True)
class Shared:
    """What of an FFN every token has: gate, up and down of `width` neurons, resident."""

    width: int
    gated: bool = False  # its output is multiplied by the sigmoid of one more product with the FFN's input


@dataclass(frozen=True, slots=True)
class Ffn:
    """A feed-forward layer, in `units` units of `width` neurons.

    - plain: `down @ activation(up @ x)`
    - gated: `down @ (activation(gate @ x) * up_activation(up @ x))`

    With a `router` the units are experts, gated FFNs of `width` neurons each: the output is the sum of those
    that the router chooses, by ascending id, each times its weight. What is `shared` is added at last. An FFN
    without units is its shared part alone: the dense layers of a mixture.
    """

    kind: Literal["plain", "gated"]
    units: int
    width: int
    activation: Activation
    threshold: float = 0.0  # fatrelu: what does not exceed it becomes zero
    # Gated only; relu of both is called dReLU. clamped: what lies beyond ±limit becomes that, plus one.
    up_activation: Literal["none", "relu", "clamped"] = "none"
    limit: float = 0.0  # clamped_silu: of the gate from above; and of the up product where that is clamped
    alpha: float = 1.0  # clamped_silu: g · sigmoid(alpha · g)
    router: Router | None = None
    shared: Shared | None = None

    @property
    def neurons(self) -> int:
        return self.units * self.width

    @property
    def mixed(self) -> bool:
        """Whether it is of experts, of a shared part, or of both: no neuron is wanted by itself."""
        return self.router is not None or self.shared is not None

    @property
    def numbers(self) -> tuple[float, float]:
        """What the activation function has beside its argument: a threshold, or a limit and alpha."""
        return (self.limit if self.activation == "clamped_silu" else self.threshold), self.alpha

    @property
    def sparse(self) -> bool:
        """Whether zero activations are exact and common: then a set of neurons can be enough."""
        return self.router is None and self.activation in ("relu", "fatrelu")

    @property
    def deciding(self) -> tuple[Role, ...]:
        """Where it is sparse, the rows whose products must all be positive for a neuron to be active."""
        if self.kind == "plain":
            return ("up",)
        return ("gate", "up") if self.up_activation == "relu" else ("gate",)


@dataclass(frozen=True, slots=True)
class Layer:
    """One block. x is the residual stream, A attention, F the FFN; a norm that it has not changes nothing.

    - in sequence: x = attention_sum(x + s · attention_output(A(attention_input(x))));
      x = ffn_sum(x + s · ffn_output(F(ffn_input(x)))), with s the `branch_scale`
    - `parallel`:  x += A(attention_input(x)) + F(ffn_input(x)), where without an `ffn_input` of its own the
      FFN reads attention's input
    """

    attention: Attention
    ffn: Ffn
    norms: dict[NormPlace, Norm]
    parallel: bool = False
    branch_scale: float = 1.0  # of both sub-layers' outputs; in sequence only

    @property
    def plain(self) -> bool:
        """Whether the FFN reads ffn_input(x + s · A(attention_input(x))): attention's output has no norm."""
        return not self.parallel and not {"attention_output", "attention_sum"} & self.norms.keys()


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
    embedding_scale: float = 1.0  # of the token embedding
    logit_scale: float = 1.0
    logit_softcap: float | None = None  # c: scaled logits l become c · tanh(l / c)

    @property
    def sparse(self) -> bool:
        """Whether every FFN is: then predicted sets make sense, and `oracle` equals `all`."""
        return all(layer.ffn.sparse for layer in self.layers)

    @property
    def mixture(self) -> bool:
        """Whether any layer has experts."""
        return any(layer.ffn.router for layer in self.layers)

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


def always_floats(name: str) -> bool:
    """Whether this resident matrix is never stored in few bits."""
    return name == POSITIONS or name.endswith((".router.weight", ".shared_switch.weight"))


# Canonical names of the resident tensors in a store. Linear weights are [out, in].
EMBED = "embed.weight"  # [vocabulary, embed_dim]
POSITIONS = "positions.weight"  # [max_positions + learned_positions, d_model]
PROJECT_IN = "project_in.weight"  # [d_model, embed_dim]; embed_dim != d_model only
PROJECT_OUT = "project_out.weight"  # [embed_dim, d_model]
FINAL_NORM = "final_norm"  # .weight, .bias [d_model]; an rms norm has no bias
HEAD = "head.weight"  # [vocabulary, embed_dim]; untied only

NORM_PARTS: dict[NormPlace, str] = {  # no layer has both norms of a name
    "attention_input": "norm",
    "attention_sum": "norm",
    "attention_output": "out_norm",
    "ffn_input": "ffn_norm",
    "ffn_sum": "ffn_norm",
    "ffn_output": "down_norm",
}


def layer(index: int, part: str) -> str:
    """Name of a layer's tensor.

    Parts: `norm.weight|bias` [d_model], `qkv.weight` [(heads + 2 kv_heads) head_dim, d_model] (all
    queries, then all keys, then all values), `qkv.bias`, `q_norm.weight` and `k_norm.weight` ([head_dim],
    or [heads head_dim] and [kv_heads head_dim] over whole projections), `sinks` [heads], `out.weight`
    [d_model, heads head_dim], `out.bias`, `out_norm.weight|bias`, `ffn_norm.weight|bias`, `gate.bias` and
    `up.bias` [neurons], `down.bias` [d_model], `down_norm.weight|bias`. Biases that a checkpoint lacks are
    absent. The gate, up and down matrices are the bundles.

    Of a layer with experts: `router.weight` [experts, d_model] and `router.bias` [experts], always floats;
    `down.bias` is [experts d_model], one expert's after the other's. Of its shared part: `shared_gate.weight`
    and `shared_up.weight` [shared width, d_model], `shared_down.weight` [d_model, shared width], and
    `shared_switch.weight` [1, d_model], always floats, whose product's sigmoid is the part's weight.
    """
    return f"layers.{index}.{part}"
