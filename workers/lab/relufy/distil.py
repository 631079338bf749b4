"""What a token's loss is: the text's own, the distance to the original's answer, and that of every FFN.

    loss = CE + kl · KL(original ‖ student) + layers · mean of |FFN - original's FFN|² ÷ |original's FFN|²

The L1 penalty is no term of it: `PenalisedReLU` adds its gradient where the activations are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from workers.lab.relufy.network import Network

LOGIT_ROWS = 512  # tokens whose logits exist at once


@dataclass(frozen=True, slots=True)
class Weights:
    """Of the terms beside cross-entropy."""

    kl: float
    layers: float


@dataclass(frozen=True, slots=True)
class Terms:
    """Means over the tokens of a step."""

    loss: float  # cross-entropy, nats
    divergence: float  # nats
    error: float  # of FFNs' outputs, relative

    def __add__(self, other: Terms) -> Terms:
        return Terms(self.loss + other.loss, self.divergence + other.divergence, self.error + other.error)


def backward(student: Network, original: Network, rows: Tensor, weights: Weights, total: int) -> Terms:
    """Forward and backward of `rows` [n, length + 1], as a part of a step of `total` tokens.

    The gradients gather in the student. The terms are this part's share of the step's means.
    """
    ids, targets = rows[:, :-1], rows[:, 1:].flatten()
    kind = rows.device.type
    with torch.autocast(kind, torch.bfloat16):
        with torch.no_grad(), original.outputs() as wanted:
            reference = original.hidden(ids).flatten(0, 1)
        with student.outputs() as found:
            hidden = student.hidden(ids).flatten(0, 1)
    zero = torch.zeros((), device=rows.device)
    nats, divergence = zero, zero
    for start in range(0, len(targets), LOGIT_ROWS):
        part = slice(start, start + LOGIT_ROWS)
        one: Any = checkpoint(
            _head, student, original, hidden[part], reference[part], targets[part], use_reentrant=False
        )
        nats, divergence = nats + one[0], divergence + one[1]
    share = len(targets) / total
    error = torch.stack([_apart(a, b) for a, b in zip(found, wanted, strict=True)]).mean() * share
    nats, divergence = nats / total, divergence / total
    (nats + weights.kl * divergence + weights.layers * error).backward()  # type: ignore[no-untyped-call]
    return Terms(nats.item(), divergence.item(), error.item())


def _head(
    student: Network, original: Network, hidden: Tensor, reference: Tensor, targets: Tensor
) -> tuple[Tensor, Tensor]:
    """Summed cross-entropy, and summed divergence from the original."""
    with torch.autocast(hidden.device.type, torch.bfloat16):
        logits = student.head(hidden)
        with torch.no_grad():
            wanted = original.head(reference)
    logs = torch.log_softmax(logits.float(), dim=-1)
    sure = torch.log_softmax(wanted.float(), dim=-1)
    nats = functional.nll_loss(logs, targets, reduction="sum")
    return nats, (sure.exp() * (sure - logs)).sum()


def _apart(found: Tensor, wanted: Tensor) -> Tensor:
    """Squared distance, of the wanted's squared length."""
    return (found.float() - wanted.float()).square().sum() / wanted.float().square().sum().clamp(min=1e-12)
