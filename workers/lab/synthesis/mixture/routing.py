"""What a mixture's routing looks like on a text, layer by layer, beside published figures.

Every layer is computed over one sequence: a prompt and what follows it. *Reuse* is the share of a token's
experts that an earlier token had; *recall* the share of a layer's experts that its router names when it reads
the input of a layer before; *chance* what reuse would be if each token drew its experts alone, as often as
they are used in the whole text.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from storage.store import Store
from workers.lab.synthesis import block
from workers.lab.synthesis.activity import WARM_UP
from workers.lab.synthesis.mixture.dense import DenseMixture, routed, router_logits
from workers.routing import Ids, ranked

LAGS = (1, 8)  # tokens
WINDOW = 8  # tokens, of what is new
AHEAD = (1, 2, 3)  # layers
HOTTEST = 8  # experts

Chosen = npt.NDArray[np.bool_]  # [tokens, experts]

# facts: route traces of BigMoeOnEdge (Qwen3-30B-A3B) and published probes of OLMoE. Means over layers.
PUBLISHED: dict[str, dict[str, float]] = {
    "qwen3_moe": {
        "reuse_1": 0.40,
        "reuse_8": 0.27,
        "new": 0.20,
        "touched": 0.50,
        "hottest": 0.44,
        "recall_1": 0.886,
        "recall_2": 0.85,
        "recall_3": 0.81,
    },
    "olmoe": {"reuse_1": 0.37},
}


@dataclass(frozen=True, slots=True)
class RoutingReport:
    """One layer's. Shares of a token's experts, but for `touched`."""

    layer: int
    reuse: dict[int, float]  # by lag
    chance: float
    new: float  # that none of the WINDOW tokens before had
    touched: float  # share of the layer's experts that any token had
    hottest: float  # of all choices, what the HOTTEST experts got
    recall: dict[int, float]  # by layers ahead
    routed_cosine: float | None  # of this and the last such layer's FFN inputs


@torch.no_grad()
def measure(
    store: Store,
    tokens: Sequence[int],
    layers: int | None = None,
    heard: Callable[[int], None] = lambda layer: None,
) -> list[RoutingReport]:
    """Reports of the layers that have a router, of the first `layers`; `heard` hears how many are done."""
    dense, model = DenseMixture.of(store), store.architecture
    x = dense.embedded(list(tokens))
    inputs: deque[Tensor] = deque(maxlen=max(AHEAD) + 1)
    reports = []
    for index, layer in enumerate(model.layers[:layers]):
        tensors = dense.layer(index)
        attended_x = block.attention(layer, tensors, block.attention_input(layer, tensors, x))
        f = block.ffn_input(layer, tensors, x, attended_x)
        inputs.appendleft(f)
        routing = routed(layer.ffn, tensors, f)
        if routing is not None:
            count = layer.ffn.units
            guesses = {
                ahead: _chosen(ranked(router_logits(tensors, inputs[ahead]), routing.ids.shape[1]), count)
                for ahead in AHEAD
                if ahead < len(inputs)
            }
            reports.append(_report(index, _chosen(routing.ids, count), guesses, list(inputs)))
        x = block.block_output(layer, tensors, x, attended_x, dense.ffn(index, tensors, f, routing))
        heard(index + 1)
    return reports


def _chosen(ids: Ids, experts: int) -> Chosen:
    made = np.zeros((ids.shape[0], experts), np.bool_)
    np.put_along_axis(made, ids, True, axis=1)
    return made


def _report(layer: int, chosen: Chosen, guesses: dict[int, Chosen], inputs: list[Tensor]) -> RoutingReport:
    seen = np.zeros_like(chosen)
    for lag in range(1, WINDOW + 1):
        seen[lag:] |= chosen[:-lag]
    choices = np.sort(chosen.sum(axis=0))
    cosine = None
    if len(inputs) > 1:
        cosine = float(torch.cosine_similarity(inputs[0], inputs[1], dim=1)[WARM_UP:].mean())
    return RoutingReport(
        layer=layer,
        reuse={lag: _share(chosen[:-lag], chosen[lag:]) for lag in LAGS},
        chance=chance(choices, len(chosen)),
        new=1 - _share(seen[WARM_UP:], chosen[WARM_UP:]),
        touched=float(chosen.any(axis=0).mean()),
        hottest=float(choices[-HOTTEST:].sum() / choices.sum()),
        recall={ahead: _share(guess[WARM_UP:], chosen[WARM_UP:]) for ahead, guess in guesses.items()},
        routed_cosine=cosine,
    )


def chance(choices: npt.NDArray[np.int64], tokens: int) -> float:
    """Reuse between `tokens` that draw their experts each without regard to the others, as often as these."""
    often = choices / tokens
    return float(np.square(often).sum() / often.sum())


def _share(some: Chosen, of: Chosen) -> float:
    return float((some & of).sum() / of.sum())


def summary(reports: Sequence[RoutingReport]) -> dict[str, Any]:
    """Means over layers, under the names of `PUBLISHED`."""
    found: dict[str, Any] = {
        name: statistics.fmean(getattr(report, name) for report in reports)
        for name in ("chance", "new", "touched", "hottest")
    }
    found |= {f"reuse_{lag}": statistics.fmean(report.reuse[lag] for report in reports) for lag in LAGS}
    for ahead in AHEAD:
        some = [report.recall[ahead] for report in reports if ahead in report.recall]
        found[f"recall_{ahead}"] = statistics.fmean(some) if some else None
    return found
