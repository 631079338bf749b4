"""Attention over tensors, with the keys and values of the tokens so far."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from pipeline.ring.plan import QUERIES
from storage.architecture import Architecture
from storage.codecs import Codec
from workers.compute.positions import Positions


class Attending:
    """Every layer's attention between its projections. Without a context nothing is kept."""

    def __init__(self, model: Architecture, context: int, codec: Codec, where: torch.device) -> None:
        """Keys and values are kept in `codec`, a float, [kv_heads, context, head_dim] of each layer."""
        self._layers = [layer.attention for layer in model.layers]
        self._where = where
        self._kept: list[tuple[Tensor, Tensor]] = []
        self._first = 0
        self._sequences = 1
        self._lay_tables(context)
        if context:
            kind = getattr(torch, codec.name)
            for layer in self._layers:
                shape = (layer.kv_heads, context, layer.head_dim)
                keys, values = (torch.zeros(shape, dtype=kind, device=where) for _ in range(2))
                self._kept.append((keys, values))

    @property
    def kept(self) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of every layer; empty without a context."""
        return self._kept

    def begin(self, first: int, count: int, sequences: int) -> None:
        assert not self._kept or sequences == 1, "the cache holds one sequence"
        assert self._kept or first == 0, "nothing is kept of what was before"
        self._first, self._sequences = first, sequences
        if not self._kept and count != self._context:
            self._lay_tables(count)

    def _lay_tables(self, context: int) -> None:
        self._context = context
        tables = Positions(self._layers, context)
        here: dict[int, Tensor] = {}  # layers with equal positions share theirs
        arrays = [*(table for pair in tables.rotary for table in pair), *tables.bias]
        for array in arrays:
            if id(array) not in here:
                here[id(array)] = torch.from_numpy(array).to(self._where)
        self._rotary = [(here[id(cos)], here[id(sin)]) for cos, sin in tables.rotary]
        self._bias = [here[id(bias)] for bias in tables.bias]

    def __call__(self, index: int, queries: Tensor, keys: Tensor, values: Tensor, sinks: Tensor) -> Tensor:
        """[tokens, heads · head_dim] from the same; keys and values [tokens, kv_heads · head_dim]."""
        a = self._layers[index]
        queries, keys, values = (  # [sequences, heads, tokens, head_dim]
            part.reshape(self._sequences, -1, part.shape[1] // a.head_dim, a.head_dim).transpose(1, 2)
            for part in (queries, keys, values)
        )
        tokens = queries.shape[2]
        if a.rope is not None:
            rows = slice(self._first, self._first + tokens)
            cos, sin = (table[rows] for table in self._rotary[index])
            queries, keys = _rotated(queries, cos, sin), _rotated(keys, cos, sin)
        oldest = 0 if a.window is None else max(0, self._first + 1 - a.window)  # that any token sees
        if self._kept:
            keys, values = self._with_past(index, keys[0], values[0], oldest)
        else:
            oldest = 0
        found = [
            self._mixed(index, queries[:, :, start : start + QUERIES], start, keys, values, sinks, oldest)
            for start in range(0, tokens, QUERIES)
        ]
        mixed = found[0] if len(found) == 1 else torch.cat(found, dim=2)
        return mixed.transpose(1, 2).reshape(-1, a.width)

    def _mixed(
        self,
        index: int,
        queries: Tensor,
        start: int,
        keys: Tensor,
        values: Tensor,
        sinks: Tensor,
        oldest: int,
    ) -> Tensor:
        """Of some tokens' queries, the first being the step's `start`; keys begin at position `oldest`."""
        a = self._layers[index]
        known = self._first + start + queries.shape[2]
        keys, values = keys[:, :, : known - oldest], values[:, :, : known - oldest]
        mask = self._mask(index, self._first + start, queries.shape[2], oldest)
        if a.softcap is None and not a.sinks:
            return functional.scaled_dot_product_attention(
                queries, keys, values, mask, scale=a.scale, enable_gqa=a.heads != a.kv_heads
            )
        keys, values = (part.repeat_interleave(a.heads // a.kv_heads, dim=1) for part in (keys, values))
        scores = queries @ keys.transpose(2, 3) * a.scale
        if a.softcap is not None:
            scores = a.softcap * torch.tanh(scores / a.softcap)
        return _shares(scores if mask is None else scores + mask, sinks) @ values

    def _with_past(self, index: int, keys: Tensor, values: Tensor, oldest: int) -> tuple[Tensor, Tensor]:
        """Keep the step's; returns all from `oldest` on, [1, kv_heads, tokens, head_dim], these unrounded."""
        last = self._first + keys.shape[1]
        whole = []
        for kept, new in zip(self._kept[index], (keys, values), strict=True):
            kept[:, self._first : last] = new
            if kept.dtype == torch.float32:
                whole.append(kept[None, :, oldest:last])
            else:
                whole.append(torch.cat((kept[:, oldest : self._first].float(), new), dim=1)[None])
        return whole[0], whole[1]

    def _mask(self, index: int, first: int, tokens: int, oldest: int) -> Tensor | None:
        """[heads or 1, tokens, keys]: ALiBi where there is one, no future, and a window's past."""
        known = first + tokens
        bias = self._bias[index]
        if tokens == 1 and not bias.numel():
            return None
        none = torch.zeros(1, 1, 1, device=self._where)
        mask = bias[:, None, oldest:known] if bias.numel() else none
        allowed = torch.ones(tokens, known - oldest, dtype=torch.bool, device=self._where)
        allowed = allowed.tril(first - oldest)
        window = self._layers[index].window
        if window is not None:
            allowed = allowed.triu(first - oldest - window + 1)
        return mask.masked_fill(~allowed, -torch.inf)


def _shares(scores: Tensor, sinks: Tensor) -> Tensor:
    """Of keys, [1, heads, tokens, keys]; a sink takes its own of them all."""
    if not sinks.numel():
        return scores.softmax(-1)
    column = sinks.view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
    return torch.cat((scores, column), -1).softmax(-1)[..., :-1]


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The first values of each head, as many as there are angles for, twice."""
    pairs = cos.shape[-1]
    low, high, rest = x[..., :pairs], x[..., pairs : 2 * pairs], x[..., 2 * pairs :]
    return torch.cat((low * cos - high * sin, high * cos + low * sin, rest), dim=-1)
