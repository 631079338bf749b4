"""Every tensor of a synthetic mixture by its canonical name, in the store's codecs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from storage import architecture as canonical
from storage.architecture import Architecture, Attention, Ffn, Router
from storage.codecs import F32, Carrier
from storage.errors import UnsupportedModel
from storage.layout import Role
from workers.lab.synthesis.mixture import attention, draw
from workers.lab.synthesis.mixture.levels import CONSTANT, GROUP, Level, Parts, first, levels
from workers.lab.synthesis.mixture.planting import MixturePlanting
from workers.routing import route

MATRICES = "q8"  # attention, embedding and head
EXPERTS = {4: "q4s", 8: "q8"}  # by bits
PUBLISHED_EXPERTS = {"gpt_oss": "mxfp4"}  # of families that are published in four bits
BLOCK = 8192  # rows of embedding and head that are drawn together
NORM_JITTER = 0.05  # of norm weights around 1, so that a forgotten norm weight shows
QUERY_NOISE = 0.5  # standard deviation of what queries and keys have beside their constants
HEAD = 2.0  # of the logits
BIAS = 0.05  # standard deviation of biases, as a share of what they are added to
_SINK = 0.5  # standard deviation; a score of distance 0 is 5
_GRID = np.linspace(-8, 8, 4001)
_BELL = np.exp(-(_GRID**2) / 2) / math.sqrt(2 * math.pi)


def activation(ffn: Ffn) -> float:
    """Root mean square of an expert's activations, for products of standard deviation 1."""
    gate, steep = (_GRID, 1.0) if ffn.activation == "silu" else (np.minimum(_GRID, ffn.limit), ffn.alpha)
    square = np.trapezoid((gate / (1 + np.exp(-steep * gate))) ** 2 * _BELL, _GRID)
    return math.sqrt(square * (1.0 if ffn.activation == "silu" else 2.0))  # 1 + u has twice u's square


@dataclass(frozen=True)
class Tensors:
    """Draws them. Equal fields give equal tensors, in whichever order."""

    model: Architecture
    planting: MixturePlanting
    seed: int
    bits: int = 4
    parts: Parts = field(init=False)
    levels: tuple[tuple[Level, Level], ...] = field(init=False)

    def __post_init__(self) -> None:
        """Raises UnsupportedModel."""
        for layer in self.model.layers:
            ffn, a = layer.ffn, layer.attention
            known = ffn.activation in ("silu", "clamped_silu")
            if ffn.router is None or ffn.shared is not None or not known or a.rope is None:
                raise UnsupportedModel(
                    f"routing can be planted in layers of SiLU experts alone, with rotary positions, which "
                    f"{self.model.family} does not have"
                )
        object.__setattr__(self, "parts", Parts.of(self.model))
        object.__setattr__(self, "levels", tuple(levels(self.model, self.planting)))

    def codec(self, name: str) -> str:
        """Of a resident tensor."""
        vector = name.endswith(("norm.weight", ".bias", ".sinks"))
        return "float32" if vector or canonical.always_floats(name) else MATRICES

    @property
    def experts(self) -> str:
        """The codec of all experts."""
        usual = EXPERTS[self.bits]
        return PUBLISHED_EXPERTS.get(self.model.family, usual) if self.bits == 4 else usual

    def expert(self, layer: int, expert: int, role: Role) -> Carrier:
        """gate and up [width, d_model], down [d_model, width]: the bytes of their rows."""
        ffn, level = self.model.layers[layer].ffn, self.levels[layer][1]
        bits, codec = self._source(layer, "expert", expert, role), self.experts
        if role != "down":
            return draw.matrix(bits, ffn.width, self.model.d_model, codec, self._reading(1.0, level))
        written = self._written(layer) / np.float32(math.sqrt(ffn.width) * activation(ffn))
        return draw.matrix(bits, self.model.d_model, ffn.width, codec, written)

    def _written(self, layer: int) -> F32:
        """The deviation of what an expert writes into each coordinate, [d_model, 1], before it is weighed."""
        level, written = self.levels[layer][1], np.zeros((self.model.d_model, 1), np.float32)
        written[CONSTANT:] = math.sqrt(self.planting.ffn_energy * level.rest / self.parts.rest)
        written[self.parts.columns] = math.sqrt(self.planting.turn * level.own / self.parts.routed)
        return written / np.float32(self._weights(layer))

    def blocks(self, name: str) -> Iterator[Carrier]:
        """A resident tensor, some lines at a time."""
        if name in (canonical.EMBED, canonical.HEAD):
            for start in range(0, self.model.vocabulary, BLOCK):
                yield self._vocabulary(name, start, min(start + BLOCK, self.model.vocabulary))
            return
        yield self._whole(name)

    def _whole(self, name: str) -> Carrier:
        if name == f"{canonical.FINAL_NORM}.weight":
            return self._norm(name)
        layers, number, part = name.split(".", 2)
        assert layers == "layers", f"no tensor is called {name}"
        layer = int(number)
        of, _, kind = part.rpartition(".")
        if part in ("norm.weight", "ffn_norm.weight"):
            return self._norm(name)
        if kind == "bias" and of in ("qkv", "out", "router", "gate", "up", "down"):
            return self._bias(layer, of)
        makers: dict[str, Callable[[int], Carrier]] = {
            "q_norm.weight": partial(self._head_norm, "q"),
            "k_norm.weight": partial(self._head_norm, "k"),
            "qkv.weight": self._projections,
            "out.weight": self._out,
            "router.weight": self._router,
            "sinks": self._sinks,
        }
        if part in makers:
            return makers[part](layer)
        raise UnsupportedModel(f"{self.model.family} has {part}, which cannot be synthesised")

    def _bias(self, layer: int, of: str) -> F32:
        """What is added to products: little, so that what is planted stays. Experts' are [experts, size]."""
        (a, level), ffn, parts = self._attention(layer), self.model.layers[layer].ffn, self.parts
        match of:
            case "qkv":
                usual = np.ones(a.projected)
                values = usual[a.width + a.kv_heads * a.head_dim :].reshape(a.kv_heads, -1)
                values[:, : parts.routed] = 0
            case "out":
                usual = np.zeros(self.model.d_model)
                usual[CONSTANT + parts.routed :] = math.sqrt(
                    self.planting.attention_energy * level.rest / parts.rest
                )
            case "router":
                usual = np.full(ffn.units, self.planting.logits)
            case "down":
                usual = np.tile(self._written(layer).T, (ffn.units, 1))
            case _:
                usual = np.ones((ffn.units, ffn.width))
        noise = draw.normal(usual.shape, self.seed, layer, of, "bias")
        return np.asarray(BIAS * usual * noise, np.float32)

    def _source(self, *what: object) -> np.random.SFC64:
        return draw.source(self.seed, self.model.d_model, *what)

    @property
    def _pattern(self) -> F32:
        """The constant part's direction, [CONSTANT], of length 1."""
        signs = np.sign(draw.normal((CONSTANT,), self.seed, "constant"))
        return np.asarray(signs / math.sqrt(CONSTANT), np.float32)

    def _reading(self, deviation: float, level: Level, routed: float = 1.0) -> F32:
        """Of each group of a row that reads the normed stream for a product of this deviation.

        It sees nothing of the constant part, and `routed` times as much of the routed one.
        """
        groups = np.ones((1, self.parts.width // GROUP), np.float32)
        groups[:, : CONSTANT // GROUP] = 0
        groups[:, CONSTANT // GROUP : (CONSTANT + self.parts.routed) // GROUP] = routed
        seen = level.seen(routed**2 * level.routed + level.rest, self.parts.width)
        return groups * np.float32(deviation / math.sqrt(seen))

    def _constant(self, level: Level) -> F32:
        """What a row has in the constant part, [CONSTANT], for a product of 1."""
        return self._pattern / np.float32(math.sqrt(level.seen(level.constant, self.parts.width)))

    def _vocabulary(self, name: str, start: int, stop: int) -> Carrier:
        width, parts, level = self.model.d_model, self.parts, first(self.planting, self.model.d_model)
        bits = self._source(name, start)
        if name == canonical.HEAD:
            groups = self._reading(HEAD, self.levels[-1][1])
            return draw.matrix(bits, stop - start, width, MATRICES, groups)
        groups = np.full((1, width // GROUP), math.sqrt(level.rest / parts.rest), np.float32)
        groups[:, CONSTANT // GROUP : (CONSTANT + parts.routed) // GROUP] = math.sqrt(
            level.own / parts.routed
        )
        made = draw.matrix(bits, stop - start, width, MATRICES, groups)
        draw.put(made, MATRICES, 0, self._pattern[None] * np.float32(math.sqrt(level.constant)))
        return made

    def _norm(self, name: str) -> F32:
        made = 1 + np.float32(NORM_JITTER) * draw.normal((self.model.d_model,), self.seed, name)
        made[:CONSTANT] = 1
        return made

    def _attention(self, layer: int) -> tuple[Attention, Level]:
        return self.model.layers[layer].attention, self.levels[layer][0]

    def _constant_queries(self, layer: int) -> F32:
        return attention.queries(self._attention(layer)[0], self.planting, self.seed, layer)

    def _projections(self, layer: int) -> Carrier:
        return np.concatenate([self._queries(layer), self._keys(layer), self._values(layer)])

    def _sinks(self, layer: int) -> F32:
        heads = self.model.layers[layer].attention.heads
        return np.float32(_SINK) * draw.normal((heads,), self.seed, layer, "sinks")

    def _queries(self, layer: int) -> Carrier:
        a, level = self._attention(layer)
        return self._looking(layer, "queries", self._constant_queries(layer).reshape(a.width), level)

    def _keys(self, layer: int) -> Carrier:
        a, level = self._attention(layer)
        return self._looking(layer, "keys", np.tile(attention.keys(a), a.kv_heads), level)

    def _looking(self, layer: int, what: str, constants: F32, level: Level) -> Carrier:
        """Rows whose products are constants, and some noise."""
        bits, width = self._source(layer, what), self.model.d_model
        made = draw.matrix(bits, constants.size, width, MATRICES, self._reading(QUERY_NOISE, level))
        draw.put(made, MATRICES, 0, np.outer(constants, self._constant(level)))
        return made

    def _head_norm(self, one: str, layer: int) -> F32:
        """A norm of queries or keys that leaves them as they are, about."""
        a, _ = self._attention(layer)
        assert a.qk_norm is not None
        constants = self._constant_queries(layer) if one == "q" else attention.keys(a)[None]
        usual = float(np.sqrt(np.mean(constants**2) + QUERY_NOISE**2))
        heads = (a.heads if one == "q" else a.kv_heads) if a.qk_norm.over == "whole" else 1
        jitter = draw.normal((heads * a.head_dim,), self.seed, layer, one, "norm")
        return np.float32(usual) * (1 + np.float32(NORM_JITTER) * jitter)

    def _values(self, layer: int) -> Carrier:
        """A head's first values are the routed part, the others anything else, all of deviation 1."""
        (a, level), parts = self._attention(layer), self.parts
        rows = a.kv_heads * a.head_dim
        routed = np.arange(rows) % a.head_dim < parts.routed
        deviations = np.where(routed[:, None], 0, self._reading(1.0, level, routed=0.0))
        made = draw.matrix(self._source(layer, "values"), rows, self.model.d_model, MATRICES, deviations)
        same = np.eye(parts.routed, dtype=np.float32)
        same /= math.sqrt(level.seen(level.routed, parts.width) / parts.routed)
        for head in range(a.kv_heads):
            start = head * a.head_dim
            draw.put(made[start : start + parts.routed], MATRICES, CONSTANT, same)
        return made

    def _out(self, layer: int) -> Carrier:
        (a, level), parts, planting = self._attention(layer), self.parts, self.planting
        constants, vocabulary = self._constant_queries(layer), self.model.vocabulary
        left = [attention.left(a, constants[head], vocabulary, self.seed) for head in (0, 1)]
        # Of a head's values: what they share with the tokens before stays, the rest is averaged away.
        same = level.slow / level.routed
        kept = [same + (1 - same) * one for one in left]
        ordinary = (sum(kept) * parts.routed + sum(left) * (a.head_dim - parts.routed)) / (2 * a.head_dim)
        written = np.zeros((parts.width, 1), np.float32)
        written[CONSTANT:] = math.sqrt(planting.attention_energy * level.rest / parts.rest)
        written[parts.columns] = 0
        written /= math.sqrt(a.width * ordinary)
        made = draw.matrix(self._source(layer, "out"), parts.width, a.width, MATRICES, written)
        energy, brought = self.levels[layer][1].slow - level.slow, planting.slow + planting.short
        for parity, share in enumerate((planting.slow, planting.short)):
            heads = range(parity, a.heads, 2)
            if not energy or not share:
                continue
            turned = draw.normal((parts.routed, parts.routed), self.seed, layer, "turned", parity)
            turned *= math.sqrt(energy * share / brought / kept[parity]) / (parts.routed * len(heads))
            for head in heads:
                draw.put(made[parts.columns], MATRICES, head * a.head_dim, turned)
        return made

    def _router(self, layer: int) -> F32:
        model, planting, parts = self.model, self.planting, self.parts
        experts, level = model.layers[layer].ffn.units, self.levels[layer][1]
        made = draw.normal((experts, parts.width), self.seed, layer, "router")
        noise, routed = (
            planting.logits * math.sqrt(share / level.seen(energy, parts.width))
            for share, energy in ((planting.noise, level.rest), (1 - planting.noise, level.routed))
        )
        made[:, CONSTANT:] *= noise
        made[:, parts.columns] *= routed / noise
        made[:, :CONSTANT] = np.outer(planting.logits * self._biases(layer), self._constant(level))
        return made

    def _biases(self, layer: int) -> F32:
        """Of each expert's logit, in standard deviations of the rest of it."""
        experts = self.model.layers[layer].ffn.units
        order = np.random.Generator(self._source(layer, "heat")).permutation(experts)
        heat = np.log(1 - (order + 0.5) / experts)
        return np.asarray((self.planting.bias if layer else self.planting.first_bias) * heat, np.float32)

    def _weights(self, layer: int) -> float:
        """The root of the sum of the squares of a token's weights, in the mean."""
        router: Router | None = self.model.layers[layer].ffn.router
        assert router is not None
        some = draw.normal((256, self.model.layers[layer].ffn.units), self.seed, "weights")
        logits = np.float32(self.planting.logits) * (some + self._biases(layer))
        return float(np.sqrt(np.square(route(router, logits).weights).sum(axis=1).mean()))
