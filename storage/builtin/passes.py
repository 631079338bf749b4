"""Forward and backward of one training step, in passes that one thread takes or several share.

Threads that share passes wait for each other once a step; threads that share each product wait at each, which
on cores that other jobs use takes six times the work. Gradients are summed in the order of the networks.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

from storage.builtin.experts import evenness
from storage.builtin.network import Network

TOKENS_PER_PASS = 5_120  # at most: smaller activations stay in the cache; a step of few tokens has two passes


@dataclass(frozen=True)
class Pass:
    """What forward passes said, as means over their tokens; counts are sums."""

    tokens: int
    loss: float  # nats a token
    shares: Tensor  # [steered], of FFN activations non-zero
    balances: Tensor  # [layers with experts], 1 where traffic and probabilities are even
    counts: Tensor  # [layers with experts, experts], tokens of each

    @classmethod
    def together(cls, passes: Sequence[Pass]) -> Pass:
        """One for all tokens of several."""
        tokens = sum(one.tokens for one in passes)
        weights = [one.tokens / tokens for one in passes]
        return cls(
            tokens,
            sum(one.loss * weight for one, weight in zip(passes, weights, strict=True)),
            torch.stack([one.shares * weight for one, weight in zip(passes, weights, strict=True)]).sum(0),
            torch.stack([one.balances * weight for one, weight in zip(passes, weights, strict=True)]).sum(0),
            torch.stack([one.counts for one in passes]).sum(0),
        )

    def record(self) -> dict[str, object]:
        """For the log."""
        record: dict[str, object] = {"loss": round(self.loss, 4), "shares": _rounded(self.shares)}
        if len(self.counts):
            record |= {"balance": _rounded(self.balances), "evenness": _rounded(evenness(self.counts))}
        return record

    def use(self) -> str:
        """For the line of progress; empty where there are no experts."""
        if not len(self.counts):
            return ""
        even = evenness(self.counts)
        return f"balance {self.balances.mean():.3f}  evenness {even.mean():.3f} (least {even.min():.3f})  "


def _rounded(values: Tensor) -> list[float]:
    return [round(value, 4) for value in values.tolist()]


def active_share(activations: list[Tensor]) -> Tensor:
    """Share of non-zero activations per layer, `[layers]` float32."""
    return torch.tensor([torch.count_nonzero(a).item() / a.numel() for a in activations])


def replicas(model: Network, count: int) -> list[Network]:
    """The model and `count` - 1 copies, whose parameters are the model's; gradients are each one's own."""
    networks = [model]
    for _ in range(count - 1):
        network = copy.deepcopy(model)
        for copied, parameter in zip(network.parameters(), model.parameters(), strict=True):
            copied.data = parameter.data
        networks.append(network)
    return networks


def accumulate(networks: list[Network], rows: Tensor, slopes: Tensor, balance: float) -> Pass:
    """Forward and backward over `rows`; the gradients gather in the first of `replicas`.

    `slopes` `[steered]` is the gradient of the sparsity penalty; `balance` weighs each layer's balance loss.
    """
    total = rows[:, 1:].numel()
    parts = rows.split(max(1, min(TOKENS_PER_PASS // (rows.shape[1] - 1), (len(rows) + 1) // 2)))
    shared = [parts[first :: len(networks)] for first in range(len(networks))]

    def work(network: Network, some: Sequence[Tensor]) -> list[Pass]:
        return [_backward(network, part, slopes, balance, total) for part in some]

    if len(networks) == 1:
        return Pass.together(work(networks[0], parts))
    with ThreadPoolExecutor(len(networks)) as pool:
        passed = list(chain.from_iterable(pool.map(work, networks, shared)))
    for network in networks[1:]:
        for copied, parameter in zip(network.parameters(), networks[0].parameters(), strict=True):
            if copied.grad is not None:
                parameter.grad = copied.grad if parameter.grad is None else parameter.grad.add_(copied.grad)
                copied.grad = None
    return Pass.together(passed)


def _backward(network: Network, rows: Tensor, slopes: Tensor, balance: float, total: int) -> Pass:
    """One pass; its gradients are those of a mean over `total` tokens."""
    tokens = rows[:, 1:].numel()
    with torch.autocast("cpu", torch.bfloat16):
        hidden, activations = network(rows[:, :-1], slopes)
    loss = network.loss(hidden, rows[:, 1:]) / total
    said = loss.item() * total / tokens
    balances, counts = torch.zeros(0), torch.zeros(0, 0)
    if routings := network.routings():
        balances = torch.stack([routing.balance() for routing in routings])
        counts = torch.stack([routing.counts() for routing in routings])
        loss = loss + balance * tokens / total * balances.sum()
    loss.backward()
    return Pass(tokens, said, active_share(activations), balances.detach(), counts)
