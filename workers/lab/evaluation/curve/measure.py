"""Variants of a model on one text: quality beside the exact one, and the bytes that they need."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from storage.architecture import Ffn
from storage.layout import LayerLayout, Role
from storage.store import Store
from workers.lab.evaluation.curve.copies import Copy
from workers.lab.evaluation.curve.journal import Stage
from workers.lab.evaluation.curve.layer import Inputs, LayerFfn
from workers.lab.evaluation.curve.passes import Passes
from workers.lab.evaluation.curve.variant import DENSE, Variant
from workers.lab.evaluation.statistics import Estimate, proportion, ratio_of_perplexities

_LOGIT_ROWS = 512  # tokens whose logits exist at once
_SAMPLED = 8  # of so many tokens one tells the recall: it needs all scores in order


@dataclass(frozen=True, slots=True)
class Measured:
    """One variant beside the exact model, on the same tokens."""

    variant: Variant
    perplexity: float
    ratio: Estimate  # of perplexities
    divergence_mean: float  # Kullback–Leibler, nats a token
    divergence_p99: float
    agreement: Estimate  # share of tokens whose likeliest next token is the same
    share: float  # of the neurons, chosen for a token
    recall: float  # of the weight |a|·norm that as many of the best neurons have, what the chosen ones have
    bytes_per_token: float  # of the rows of chosen neurons, none of them cached
    memory: int  # bytes of the low-bit rows


@dataclass(slots=True)
class _Scores:
    """Of one variant on a text."""

    nats: list[float] = field(default_factory=list)  # of chunks
    divergences: list[npt.NDArray[np.float64]] = field(default_factory=list)
    agreeing: int = 0


def measure(
    passes: Passes,
    rows: npt.NDArray[np.int64],
    variants: Sequence[Variant],
    centres: Sequence[Tensor] | None,
    seed: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
    stage: Stage | None = None,
) -> list[Measured]:
    """Every variant on the tokens `rows` [chunks, length], beside the exact model."""
    every, stage = [DENSE, *variants], stage or Stage()
    decoded = torch.ones(rows.shape[0], rows.shape[1] - 1, dtype=torch.bool)
    decoded[:, 0] = False  # the first token's neurons are all there
    numbers = {id(one): number for number, one in enumerate(every)}

    def see(index: int, variant: Variant, ffn: LayerFfn, inputs: Inputs, chosen: Tensor) -> None:
        some = chosen[decoded.flatten()]
        share, found = float(some.float().mean()), None
        if variant.scored != "true" and 0 < share < 1:
            found = recall(ffn, inputs.own[decoded.flatten()], some)
        stage.notes.append([numbers[id(variant)], index, share, found])

    with torch.no_grad():
        outputs = passes.run(rows[:, :-1], every, centres, see, progress, stage)
        scores = score(passes, outputs, rows[:, 1:])
    counts = np.full(len(rows), rows.shape[1] - 1)
    return [
        _summed(passes.store, one, _seen(stage, number), found, scores[0], counts, seed)
        for number, (one, found) in enumerate(zip(every, scores, strict=True))
    ]


def recall(ffn: LayerFfn, x: Tensor, chosen: Tensor) -> float:
    """Of the most weight |a|·norm that as many neurons could have, the part that the chosen ones have.

    x [n, d_model], chosen [n, neurons] bool; a mean over some of the rows.
    """
    x, chosen = x[::_SAMPLED], chosen[::_SAMPLED]
    weights = ffn.scores(ffn.activations(ffn.rows, x), None)
    counts = chosen.sum(dim=1)
    most = weights.sort(dim=1, descending=True).values.cumsum(dim=1)
    known = counts > 0
    if not known.any():
        return 0.0
    ideal = most.gather(1, (counts - 1).clamp(min=0)[:, None])[:, 0]
    return float(((weights * chosen).sum(dim=1)[known] / ideal[known].clamp(min=1e-30)).mean())


def score(passes: Passes, outputs: Sequence[Tensor], targets: npt.NDArray[np.int64]) -> list[_Scores]:
    """Of every variant's output [chunks, tokens, d_model] against the tokens that follow [chunks, tokens]."""
    found = [_Scores() for _ in outputs]
    for chunk in range(targets.shape[0]):
        nats = np.zeros(len(outputs))
        for start in range(0, targets.shape[1], _LOGIT_ROWS):
            rows = slice(start, start + _LOGIT_ROWS)
            wanted = torch.from_numpy(targets[chunk, rows])[:, None]
            reference: Tensor | None = None
            for number, output in enumerate(outputs):
                logs = torch.log_softmax(passes.logits(output[chunk, rows]), dim=-1)
                reference = logs if reference is None else reference
                nats[number] -= float(logs.gather(1, wanted).double().sum())
                apart = (reference.exp() * (reference - logs)).sum(dim=-1, dtype=torch.float64)
                found[number].divergences.append(apart.numpy())
                found[number].agreeing += int((logs.argmax(-1) == reference.argmax(-1)).sum())
        for number, one in enumerate(found):
            one.nats.append(float(nats[number]))
    return found


def _summed(
    store: Store,
    variant: Variant,
    seen: Sequence[tuple[int, float, float | None]],
    one: _Scores,
    base: _Scores,
    counts: npt.NDArray[np.int64],
    seed: int,
) -> Measured:
    nats, divergences = np.array(one.nats), np.concatenate(one.divergences)
    shares, recalls = [share for _, share, _ in seen], [one for _, _, one in seen if one is not None]
    return Measured(
        variant=variant,
        perplexity=float(np.exp(nats.sum() / counts.sum())),
        ratio=ratio_of_perplexities(nats, np.array(base.nats), counts, seed),
        divergence_mean=float(divergences.mean()),
        divergence_p99=float(np.quantile(divergences, 0.99)),
        agreement=proportion(one.agreeing, int(counts.sum())),
        share=float(np.mean(shares)),
        recall=float(np.mean(recalls)) if recalls else 1.0,
        bytes_per_token=sum(share * row_bytes(store, index, variant) for index, share, _ in seen),
        memory=copy_bytes(store, variant),
    )


def _seen(stage: Stage, number: int) -> list[tuple[int, float, float | None]]:
    """What a pass noted of one variant: layers, shares chosen, recalls."""
    return [(index, share, found) for which, index, share, found in stage.notes if which == number]


def row_bytes(store: Store, index: int, variant: Variant) -> int:
    """Bytes of a layer's true rows as far as this variant reads them."""
    layout, ffn = store.layout.layers[index], store.architecture.layers[index].ffn
    return sum(_role_bytes(layout, role) for role in read_roles(ffn, variant))


def read_roles(ffn: Ffn, variant: Variant) -> tuple[Role, ...]:
    """The true rows that a chosen neuron needs."""
    if variant.reads == "down":
        return ("down",)
    return ("gate", "up", "down") if ffn.kind == "gated" else ("up", "down")


def _role_bytes(layout: LayerLayout, role: Role) -> int:
    return layout.units * layout.unit.row_bytes(role)


def copy_bytes(store: Store, variant: Variant) -> int:
    """Bytes of the low-bit rows that a variant needs in memory; of no copy 0."""
    if variant.copy is None:
        return 0
    copy, total = Copy.of(variant.copy), 0
    for layer in store.architecture.layers:
        roles = read_roles(layer.ffn, DENSE) if variant.others == "low" else read_roles(layer.ffn, DENSE)[:-1]
        total += len(roles) * layer.ffn.neurons * copy.bytes(store.architecture.d_model)
    return total
