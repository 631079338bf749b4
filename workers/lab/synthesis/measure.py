"""What a model's activity looks like on a text, beside the paper's figures.

Every layer is computed densely over one sequence. The predictor is the training-free one: a truncated
SVD of the projection that decides (up, or a gated FFN's gate; where both do, the lower score) with the
true biases, and one threshold a layer and look-ahead, below which `MISSES` of the active neurons score.
With look-ahead k a layer's set is predicted from the FFN input of the k-th layer before; layers below k
have no such source and are left out.
"""

from __future__ import annotations

import json
import statistics
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from storage.architecture import Ffn
from workers.lab.synthesis import block
from workers.lab.synthesis.activity import WARM_UP, new_per_token, union_size
from workers.lab.synthesis.sources import Weights
from workers.lab.training.report import threshold
from workers.lab.training.svd import decompose

WINDOWS = range(1, 9)  # tokens
LOOKAHEADS = (0, 1, 2)
MISSES = 0.05  # of the active; the paper's false negatives
WINDOW = 5  # tokens, of the summary

PAPER = {
    "opt": {"active": 0.03, "predicted": 0.10, "new": 0.024, "union": 0.24, "over": 3.0, "recall": 0.95},
    "falcon": {"active": 0.05, "new": 0.031, "union": 0.33},
}  # arXiv 2312.11514, sections 3.1 and 4; its unions are of windows of 4


@dataclass(frozen=True, slots=True)
class Prediction:
    """The training-free predictor of one layer at one look-ahead; shares are of the active or of d_ff."""

    recall: float
    predicted: float  # share of d_ff
    over: float  # predicted ÷ active
    false_positives: float  # share of the inactive
    recall_same: float  # with the threshold of look-ahead 0
    predicted_same: float
    new: list[float]  # for each of WINDOWS
    union: list[float]


@dataclass(frozen=True, slots=True)
class LayerReport:
    """One layer's activity."""

    layer: int
    active: float
    new: list[float]  # true sets, for each of WINDOWS
    union: list[float]
    cosine: float | None  # of this and the last layer's FFN inputs, mean over tokens
    predictions: dict[int, Prediction]  # by look-ahead


@torch.no_grad()
def measure(
    weights: Weights, tokens: Sequence[int], rank: int, heard: Callable[[int], None] = lambda layer: None
) -> list[LayerReport]:
    """Every layer's report; `heard` is called with the number of layers done."""
    model = weights.architecture
    ids = torch.tensor(tokens)
    # The embedding's rows come in the sequence's order.
    x = block.embedded(model, weights.first(ids), torch.arange(len(tokens)))
    inputs: deque[Tensor] = deque(maxlen=max(LOOKAHEADS) + 1)
    reports = []
    for index, layer in enumerate(model.layers):
        tensors = weights.layer(index)
        attended_x = block.attention(layer, tensors, block.attention_input(layer, tensors, x))
        f = block.ffn_input(layer, tensors, x, attended_x)
        inputs.appendleft(f)
        products = block.products(layer, tensors, f)
        active = block.excess(layer.ffn, products) > 0
        reports.append(_layer_report(index, tensors, layer.ffn, inputs, active, rank))
        ffn = block.down(tensors, block.activated(layer.ffn, products))
        x = block.block_output(layer, tensors, x, attended_x, ffn)
        heard(index + 1)
    return reports


def _layer_report(
    layer: int, tensors: block.Tensors, ffn: Ffn, inputs: deque[Tensor], active: Tensor, rank: int
) -> LayerReport:
    none = torch.zeros(ffn.neurons)
    maps = [
        decompose(tensors[f"{role}.weight"], tensors.get(f"{role}.bias", none), rank) for role in ffn.deciding
    ]
    predictions: dict[int, Prediction] = {}
    first = 0.0  # look-ahead 0's threshold
    for lookahead, source in zip(LOOKAHEADS, inputs, strict=False):
        scores = torch.stack([one.scores(source) for one in maps]).amin(0)
        own = threshold(scores, active, MISSES)
        first = first if lookahead else own
        predictions[lookahead] = _prediction(scores, active, own, first)
    cosine = None
    if len(inputs) > 1:
        cosine = float(torch.cosine_similarity(inputs[0], inputs[1], dim=1)[WARM_UP:].mean())
    return LayerReport(
        layer=layer,
        active=float(active[WARM_UP:].float().mean()),
        new=[new_per_token(active, window) for window in WINDOWS],
        union=[union_size(active, window) for window in WINDOWS],
        cosine=cosine,
        predictions=predictions,
    )


def _prediction(scores: Tensor, active: Tensor, own: float, same: float) -> Prediction:
    predicted, with_same = scores > own, scores > same
    counted, truth = predicted[WARM_UP:], active[WARM_UP:]
    share = float(counted.float().mean())
    count = max(int(truth.sum()), 1)
    return Prediction(
        recall=int((counted & truth).sum()) / count,
        predicted=share,
        over=int(counted.sum()) / count,
        false_positives=int((counted & ~truth).sum()) / max(int((~truth).sum()), 1),
        recall_same=int((with_same[WARM_UP:] & truth).sum()) / count,
        predicted_same=float(with_same[WARM_UP:].float().mean()),
        new=[new_per_token(predicted, window) for window in WINDOWS],
        union=[union_size(predicted, window) for window in WINDOWS],
    )


def summary(reports: Sequence[LayerReport]) -> dict[str, Any]:
    """Means over layers; windows are WINDOW tokens, and what depends on look-ahead is keyed by it."""
    place = WINDOWS.index(WINDOW)

    def mean(values: Sequence[float]) -> float | None:
        return statistics.fmean(values) if values else None

    def over_layers(lookahead: int, value: Callable[[Prediction], float]) -> float | None:
        found = [r.predictions[lookahead] for r in reports if lookahead in r.predictions]
        return mean([value(prediction) for prediction in found])

    cosines = [report.cosine for report in reports if report.cosine is not None]
    return {
        "active": mean([report.active for report in reports]),
        "new": mean([report.new[place] for report in reports]),
        "union": mean([report.union[place] for report in reports]),
        "cosine": mean(cosines),
        "lookahead": {
            str(lookahead): {
                "recall": over_layers(lookahead, lambda p: p.recall),
                "predicted": over_layers(lookahead, lambda p: p.predicted),
                "over": over_layers(lookahead, lambda p: p.over),
                "false_positives": over_layers(lookahead, lambda p: p.false_positives),
                "recall_same_threshold": over_layers(lookahead, lambda p: p.recall_same),
                "predicted_same_threshold": over_layers(lookahead, lambda p: p.predicted_same),
                "new": over_layers(lookahead, lambda p: p.new[place]),
                "union": over_layers(lookahead, lambda p: p.union[place]),
            }
            for lookahead in LOOKAHEADS
        },
    }


def write_json(path: Path, data: dict[str, Any]) -> None:
    """Raises OSError for a path that cannot be written."""
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
