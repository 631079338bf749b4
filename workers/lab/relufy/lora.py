"""Few parameters in the place of all: every matrix of the blocks stays, and has a low-rank one beside it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Adapted(nn.Module):
    """`linear` and the product of two narrow matrices; the second begins as zeros."""

    def __init__(self, linear: nn.Linear, rank: int) -> None:
        super().__init__()
        self.linear = linear.requires_grad_(False)
        weight = linear.weight
        self.down = nn.Parameter(weight.new_empty((rank, linear.in_features)))
        self.up = nn.Parameter(weight.new_zeros((linear.out_features, rank)))
        nn.init.normal_(self.down, std=linear.in_features**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + (x @ self.down.T) @ self.up.T  # type: ignore[no-any-return]

    def merged(self) -> nn.Linear:
        """`linear` with the product added."""
        with torch.no_grad():
            self.linear.weight += self.up @ self.down
        return self.linear


def adapt(decoder: Any, rank: int) -> None:
    """Give every matrix of the decoder an adapter; nothing else is trained from now on."""
    decoder.requires_grad_(False)
    for parent, name, linear in _linears(decoder, nn.Linear):
        setattr(parent, name, Adapted(linear, rank))


def merge(decoder: Any) -> None:
    """Put the adapters into their matrices."""
    for parent, name, adapted in _linears(decoder, Adapted):
        setattr(parent, name, adapted.merged())


def _linears(decoder: Any, kind: type) -> list[tuple[Any, str, Any]]:
    """Modules of a class, with their parents and names there."""
    return [
        (parent, name, module)
        for parent in decoder.modules()
        if not isinstance(parent, Adapted)
        for name, module in parent.named_children()
        if isinstance(module, kind)
    ]
