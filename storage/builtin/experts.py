"""A layer of experts for the trainer: router, top-k, and one product an expert over its own tokens.

`Experts` takes the place of transformers' block in a `qwen3_moe` decoder. It computes the same, but sorts
the tokens by expert, so that each matrix is read once a pass, and keeps what its router said, which the
balance loss needs. Its three stacks `[experts, rows, columns]` are a checkpoint's matrices of one expert
each.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

MATRICES = ("gate_proj", "up_proj", "down_proj")
ROWS = 64  # groups have multiples of it: oneDNN compiles a product of each size anew, a millisecond each


@dataclass(frozen=True)
class Routing:
    """What one layer's router said of `n` tokens."""

    probabilities: Tensor  # [n, experts] float32, softmax over all experts
    chosen: Tensor  # [n, top_k] int64, the likeliest first

    def counts(self) -> Tensor:
        """Tokens of each expert, `[experts]` int64; `n` × top_k together."""
        return torch.bincount(self.chosen.flatten(), minlength=self.probabilities.shape[1])

    def balance(self) -> Tensor:
        """Switch's loss: experts × Σ (share of the traffic × mean probability); 1 where both are even."""
        shares = self.counts() / self.chosen.numel()
        loss: Tensor = len(shares) * torch.dot(shares, self.probabilities.mean(0))
        return loss


def evenness(counts: Tensor) -> Tensor:
    """Entropy of use over its most, log(experts): `counts` `[layers, experts]` to `[layers]` from 0 to 1."""
    shares = counts / counts.sum(1, keepdim=True)
    even: Tensor = torch.special.entr(shares).sum(1) / math.log(counts.shape[1])
    return even


@dataclass(frozen=True)
class Groups:
    """Where each token's choices lie when they are sorted by expert."""

    source: Tensor  # [total] int64, the token of each row; 0 for the rows that fill a group up
    place: Tensor  # [n, k] int64, the row of each choice
    bounds: list[tuple[int, slice]]  # the rows of each expert that has any

    @classmethod
    def of(cls, chosen: Tensor, experts: int) -> Groups:
        """`chosen` `[n, k]`; tokens keep their order within an expert."""
        flat = chosen.flatten()
        counts = torch.bincount(flat, minlength=experts)
        sizes = (counts + ROWS - 1) // ROWS * ROWS
        shifts = (sizes - counts).cumsum(0) - (sizes - counts)
        order = flat.argsort(stable=True)
        place = torch.empty_like(flat)
        place[order] = torch.arange(len(flat)) + shifts[flat[order]]
        ends = sizes.cumsum(0).tolist()
        source = torch.zeros(ends[-1], dtype=torch.int64)
        source[place] = torch.arange(len(flat)) // chosen.shape[1]
        bounds = [(e, slice(a, b)) for e, (a, b) in enumerate(zip([0, *ends], ends, strict=False)) if b > a]
        return cls(source, place.view_as(chosen), bounds)

    def gather(self, rows: Tensor) -> Tensor:
        """`[n, d]` to `[total, d]`."""
        return rows.index_select(0, self.source)

    def combine(self, rows: Tensor) -> Tensor:
        """`[total, d]` to `[n, d]`, each token's choices summed."""
        return rows.index_select(0, self.place.flatten()).view(*self.place.shape, -1).sum(1)


class GroupedExperts(torch.autograd.Function):
    """Σ weight × expert(x) over each token's experts, a gated SiLU network each.

    `x` `[n, d]`, `weights` `[n, k]`, `inner` `[experts, 2 w, d]` (gate above up), `down` `[experts, d, w]`,
    all in one dtype. Autograd would keep and scatter several large arrays more. Rows that fill a group up
    have weight 0 and add nothing.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weights: Tensor, groups: Groups, inner: Tensor, down: Tensor) -> Tensor:
        inputs = groups.gather(x)
        scale = weights.new_zeros(len(inputs), 1)
        scale[groups.place, 0] = weights
        hidden = inputs.new_empty(len(inputs), inner.shape[1])
        for expert, part in groups.bounds:
            torch.mm(inputs[part], inner[expert].T, out=hidden[part])
        gate, up = hidden.chunk(2, dim=1)
        weighted = functional.silu(gate).mul_(up).mul_(scale)
        outputs = torch.empty_like(inputs)
        for expert, part in groups.bounds:
            torch.mm(weighted[part], down[expert].T, out=outputs[part])
        ctx.save_for_backward(inputs, hidden, weighted, scale, inner, down)
        ctx.groups = groups
        return groups.combine(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, Tensor, Tensor]:
        inputs, hidden, weighted, scale, inner, down = ctx.saved_tensors
        groups = ctx.groups
        grad_outputs = groups.gather(grads[0])
        grad_weighted = torch.empty_like(weighted)
        grad_down = torch.zeros_like(down)
        for expert, part in groups.bounds:
            torch.mm(grad_outputs[part], down[expert], out=grad_weighted[part])
            torch.mm(grad_outputs[part].T, weighted[part], out=grad_down[expert])
        gate, up = hidden.chunk(2, dim=1)
        gated = functional.silu(gate)
        grad_weights = (grad_weighted * gated).mul_(up).sum(1)[groups.place]
        grad_active = grad_weighted.mul_(scale)
        grad_hidden = torch.empty_like(hidden)
        torch.mul(grad_active, gated, out=grad_hidden[:, up.shape[1] :])
        grad_hidden[:, : up.shape[1]] = torch.ops.aten.silu_backward(grad_active * up, gate)
        grad_inputs = torch.empty_like(inputs)
        grad_inner = torch.zeros_like(inner)
        for expert, part in groups.bounds:
            torch.mm(grad_hidden[part], inner[expert], out=grad_inputs[part])
            torch.mm(grad_hidden[part].T, inputs[part], out=grad_inner[expert])
        return groups.combine(grad_inputs), grad_weights, None, grad_inner, grad_down


class Experts(nn.Module):
    """The block: `[rows, length, d_model]` to the same; the router computes in float32 under autocast too."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        d_model, experts = config["hidden_size"], config["num_experts"]
        width = config["moe_intermediate_size"]
        self.top_k = config["num_experts_per_tok"]
        self.gate = nn.Linear(d_model, experts, bias=False)
        self.gate_proj = nn.Parameter(torch.empty(experts, width, d_model))
        self.up_proj = nn.Parameter(torch.empty(experts, width, d_model))
        self.down_proj = nn.Parameter(torch.empty(experts, d_model, width))
        self.routing: Routing | None = None  # of the latest call

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, -2)
        with torch.autocast("cpu", enabled=False):
            probabilities = self.gate(tokens.float()).softmax(-1)
        best, chosen = probabilities.topk(self.top_k)
        self.routing = Routing(probabilities, chosen)
        low = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else tokens.dtype
        output: Tensor = GroupedExperts.apply(
            tokens.to(low),
            (best / best.sum(-1, keepdim=True)).to(low),
            Groups.of(chosen, len(self.gate_proj)),
            torch.cat([self.gate_proj.to(low), self.up_proj.to(low)], dim=1),
            self.down_proj.to(low),
        )
        return output.view(x.shape)


def unstack(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """A checkpoint's tensors: each stack as matrices of one expert each."""
    for name, tensor in tensors.items():
        block, _, matrix = name.rpartition(".")
        if matrix not in MATRICES:
            yield name, tensor
            continue
        for expert, one in enumerate(tensor):
            yield f"{block}.experts.{expert}.{matrix}.weight", one.contiguous()


def stack(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What `unstack` was given."""
    stacks: dict[str, dict[int, Tensor]] = {}
    others = {}
    for name, tensor in tensors.items():
        found = re.fullmatch(r"(.*)\.experts\.(\d+)\.(\w+)\.weight", name)
        if found is None:
            others[name] = tensor
        else:
            stacks.setdefault(f"{found[1]}.{found[3]}", {})[int(found[2])] = tensor
    return others | {name: torch.stack([of[e] for e in range(len(of))]) for name, of in stacks.items()}
