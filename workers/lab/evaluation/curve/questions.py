"""Questions answered by several variants of a model, on the same items.

What the choices of an item have in common is computed once, but for attention.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from tokenizers import Tokenizer
from torch import Tensor

from workers.lab.evaluation.curve.journal import Stage
from workers.lab.evaluation.curve.passes import Passes
from workers.lab.evaluation.curve.variant import DENSE, Variant
from workers.lab.evaluation.report import TaskReport, compare_task, judge
from workers.lab.evaluation.tasks import Item, find, load
from workers.lab.offline.scoring import PAD, batches

_TOGETHER = 64  # items between two reports of progress


def ask(
    passes: Passes,
    tokenizer: Tokenizer,
    task: str,
    directory: Path,
    limit: int,
    variants: Sequence[Variant],
    centres: Sequence[Tensor],
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
    stage: Stage | None = None,
) -> list[TaskReport]:
    """Every variant's accuracy beside the exact model's; a choice's first token has all its neurons."""
    items = load(task, find(task, directory), limit or None)
    every, stage = [DENSE, *variants], stage or Stage()
    stage.resume(f"{passes.store.identity} {task} {len(items)} {every} {passes.copies}")
    for start in range(_TOGETHER * len(stage.notes), len(items), _TOGETHER):
        some = items[start : start + _TOGETHER]
        pairs = []
        for item in some:
            context = tokenizer.encode(item.context).ids
            pairs += [(context, tokenizer.encode(one, add_special_tokens=False).ids) for one in item.choices]
        stage.notes.append(continuations(passes, pairs, every, centres))
        stage.keep(start + len(some), {}, last=start + len(some) == len(items))
        progress(task, start + len(some), len(items))
    dense, *others = (
        judge(items, _by_item(items, chain.from_iterable(one[number] for one in stage.notes)))
        for number in range(len(every))
    )
    return [compare_task(task, dense, one) for one in others]


def _by_item(items: Sequence[Item], found: Iterable[tuple[float, bool]]) -> list[list[tuple[float, bool]]]:
    each = iter(found)
    return [[next(each) for _ in item.choices] for item in items]


def continuations(
    passes: Passes,
    pairs: Sequence[tuple[list[int], list[int]]],
    variants: Sequence[Variant],
    centres: Sequence[Tensor],
) -> list[list[tuple[float, bool]]]:
    """Of every variant: summed log-probability of each continuation, and whether it is the greedy one."""
    longest = passes.store.architecture.max_positions + 1  # the last token is no input
    sequences = [(context + continuation)[-longest:] for context, continuation in pairs]
    lengths = [len(one) - 1 for one in sequences]
    found: list[dict[int, tuple[float, bool]]] = [{} for _ in variants]
    for batch in batches(_longest_alike(pairs, lengths)):
        tokens = np.full((len(batch), max(lengths[i] for i in batch)), PAD, np.int64)
        for row, i in enumerate(batch):
            tokens[row, : lengths[i]] = sequences[i][:-1]
        alike = first_alike(tokens, [lengths[i] for i in batch])
        with torch.no_grad():
            outputs = passes.run(tokens, variants, centres, first_alike=alike)
        for number, output in enumerate(outputs):
            for row, i in enumerate(batch):
                count = min(len(pairs[i][1]), lengths[i])
                wanted = torch.tensor(sequences[i][-count:])
                logits = passes.logits(output[row, lengths[i] - count : lengths[i]])
                logs = torch.log_softmax(logits.double(), dim=-1).gather(1, wanted[:, None])
                found[number][i] = float(logs.sum()), bool((logits.argmax(-1) == wanted).all())
    return [[one[i] for i in range(len(pairs))] for one in found]


def _longest_alike(pairs: Sequence[tuple[list[int], list[int]]], lengths: Sequence[int]) -> list[int]:
    """Of each pair the longest length among those with its context: they come into one batch then."""
    longest: dict[tuple[int, ...], int] = {}
    for (context, _), length in zip(pairs, lengths, strict=True):
        key = tuple(context)
        longest[key] = max(length, longest.get(key, 0))
    return [longest[tuple(context)] for context, _ in pairs]


def first_alike(tokens: npt.NDArray[np.int64], lengths: Sequence[int]) -> Tensor:
    """Of each token of `tokens` [sequences, longest] the place of the first with the same text so far.

    What stands behind a sequence's length is nobody's text, and is like the first token.
    """
    first: dict[tuple[int, int], int] = {}
    found = np.zeros(tokens.shape, np.int64)
    for row, length in enumerate(lengths):
        before = -1
        for at in range(length):
            place = row * tokens.shape[1] + at
            before = first.setdefault((before, int(tokens[row, at])), place)
            found[row, at] = before
    return torch.from_numpy(found.flatten())
