"""Questions answered by several variants of a model, on the same items."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from workers.lab.evaluation.curve.passes import Passes
from workers.lab.evaluation.curve.variant import DENSE, Variant
from workers.lab.evaluation.report import TaskReport, compare_task, judge
from workers.lab.evaluation.tasks import find, load
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
) -> list[TaskReport]:
    """Every variant's accuracy beside the exact model's; a choice's first token has all its neurons."""
    items = load(task, find(task, directory), limit or None)
    every = [DENSE, *variants]
    answers: list[list[list[tuple[float, bool]]]] = [[] for _ in every]
    for start in range(0, len(items), _TOGETHER):
        some = items[start : start + _TOGETHER]
        pairs = []
        for item in some:
            context = tokenizer.encode(item.context).ids
            pairs += [(context, tokenizer.encode(one, add_special_tokens=False).ids) for one in item.choices]
        for number, found in enumerate(continuations(passes, pairs, every, centres)):
            each = iter(found)
            answers[number] += [[next(each) for _ in item.choices] for item in some]
        progress(task, start + len(some), len(items))
    dense = judge(items, answers[0])
    return [compare_task(task, dense, judge(items, one)) for one in answers[1:]]


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
    for batch in batches(lengths):
        tokens = np.full((len(batch), max(lengths[i] for i in batch)), PAD, np.int64)
        for row, i in enumerate(batch):
            tokens[row, : lengths[i]] = sequences[i][:-1]
        with torch.no_grad():
            outputs = passes.run(tokens, variants, centres)
        for number, output in enumerate(outputs):
            for row, i in enumerate(batch):
                count = min(len(pairs[i][1]), lengths[i])
                wanted = torch.tensor(sequences[i][-count:])
                logits = passes.logits(output[row, lengths[i] - count : lengths[i]])
                logs = torch.log_softmax(logits.double(), dim=-1).gather(1, wanted[:, None])
                found[number][i] = float(logs.sum()), bool((logits.argmax(-1) == wanted).all())
    return [[one[i] for i in range(len(pairs))] for one in found]
