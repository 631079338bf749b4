"""Log-probabilities of given tokens, dense or with every token's predicted neurons only.

Sequences are scored in batches, layer by layer: each token's FFN is restricted to the neurons that
the predictors choose for that token, exactly as the ring restricts it in decode. A dense prefill
would hide the predictors' errors. Only a sequence's first token has all its neurons: it is what the
ring must prefill. Numerically the result equals the ring's up to float32 rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from workers.lab.offline.chooser import RingChooser
from workers.lab.offline.dense import DenseModel
from workers.lab.offline.forward import forward

TOKENS_PER_BATCH = 8192  # a batch's activations: this × d_model × 4 bytes, a few times over
LOGIT_ROWS = 512  # tokens whose logits exist at once
PAD = 0  # any token: padding comes after the scored tokens, and attention is causal


@dataclass(frozen=True, slots=True)
class Scored:
    """One sequence: for every token but the first, its log-probability and the likeliest token."""

    logprobs: npt.NDArray[np.float64]  # [tokens - 1]
    likeliest: npt.NDArray[np.int64]  # [tokens - 1]


def score(
    model: DenseModel,
    sequences: Sequence[Sequence[int]],
    chooser: RingChooser | None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Scored]:
    """Score every sequence, each at least two tokens long; results in the same order.

    `progress` is told the sequences done, of all.
    """
    found: dict[int, Scored] = {}
    lengths = [len(one) - 1 for one in sequences]  # nothing follows the last token: it is no input
    for batch in batches(lengths):
        tokens = np.full((len(batch), max(lengths[i] for i in batch)), PAD, np.int64)
        for row, i in enumerate(batch):
            tokens[row, : lengths[i]] = sequences[i][:-1]
        x = forward(model, tokens, chooser)
        for row, i in enumerate(batch):
            found[i] = score_rows(model, x[row, : lengths[i]], np.array(sequences[i][1:], np.int64))
        progress(len(found), len(sequences))
    return [found[i] for i in range(len(sequences))]


def batches(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Indices grouped by similar length, each group within TOKENS_PER_BATCH padded tokens."""
    order = sorted(range(len(lengths)), key=lambda i: lengths[i], reverse=True)
    group: list[int] = []
    for i in order:
        if group and (len(group) + 1) * lengths[group[0]] > TOKENS_PER_BATCH:
            yield group
            group = []
        group.append(i)
    if group:
        yield group


def score_rows(model: DenseModel, x: torch.Tensor, targets: npt.NDArray[np.int64]) -> Scored:
    """The last layer's outputs x `[n, d_model]` against the tokens that follow them, `[n]`."""
    found = []
    for start in range(0, len(targets), LOGIT_ROWS):
        rows = slice(start, start + LOGIT_ROWS)
        found.append(score_logits(model.logits(x[None, rows])[0], targets[rows]))
    return Scored(
        np.concatenate([one.logprobs for one in found]), np.concatenate([one.likeliest for one in found])
    )


def score_logits(logits: torch.Tensor, targets: npt.NDArray[np.int64]) -> Scored:
    """Logits `[n, vocabulary]` against the tokens that follow, `[n]`."""
    normed = torch.log_softmax(logits.double(), dim=-1)
    wanted = torch.from_numpy(targets)[:, None]
    return Scored(normed.gather(1, wanted)[:, 0].numpy(), logits.argmax(dim=-1).numpy())
