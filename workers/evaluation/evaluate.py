"""Runs an evaluation: items through the tokenizer, both models' scores, one report each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from storage.errors import UsageError
from workers.compute.dense import DenseModel
from workers.evaluation.report import TaskReport, TextReport, compare_task, compare_text, judge
from workers.evaluation.scoring import Chooser, Scored, score
from workers.evaluation.tasks import Item, find, load

ITEMS_PER_ROUND = 256  # items between two progress reports
Progress = Callable[[str, int, int], None]


def chunks(tokenizer: Tokenizer, text: str, length: int, limit: int | None) -> tuple[list[list[int]], int]:
    """`text` as sequences of at most `length` tokens, each with the tokenizer's prefix, and its bytes.

    At most `limit` tokens are taken. The bytes are those of the tokens that are scored.
    """
    prefix = tokenizer.encode("").ids
    ids = tokenizer.encode(text, add_special_tokens=False).ids[:limit]
    step = length - len(prefix)
    sequences = [prefix + ids[start : start + step] for start in range(0, len(ids), step)]
    sequences = [one for one in sequences if len(one) >= 2]
    if not sequences:
        raise UsageError("the text is too short to score")
    scored = [one[1:] for one in sequences]
    return sequences, sum(len(tokenizer.decode(one, skip_special_tokens=False).encode()) for one in scored)


def evaluate_text(
    model: DenseModel,
    chooser: Chooser | None,
    sequences: list[list[int]],
    text_bytes: int,
    seed: int,
    progress: Progress = lambda stage, done, total: None,
) -> TextReport:
    """Perplexity of both models on the same chunks."""

    def scored(stage: str, by: Chooser | None) -> list[Scored]:
        return score(model, sequences, by, lambda done, total: progress(stage, done, total))

    dense = scored("text, dense", None)
    sparse = scored("text, sparse", chooser) if chooser is not None else dense
    return compare_text(dense, sparse, text_bytes, seed)


def evaluate_task(
    model: DenseModel,
    chooser: Chooser | None,
    tokenizer: Tokenizer,
    task: str,
    directory: Path,
    limit: int | None,
    progress: Progress,
) -> TaskReport:
    """Accuracy of both models on one task."""
    items = load(task, find(task, directory), limit)
    dense, sparse = [], []
    for start in range(0, len(items), ITEMS_PER_ROUND):
        some = items[start : start + ITEMS_PER_ROUND]
        dense += answer(model, None, tokenizer, some)
        sparse += answer(model, chooser, tokenizer, some) if chooser is not None else dense[start:]
        progress(task, start + len(some), len(items))
    return compare_task(task, judge(items, dense), judge(items, sparse))


def answer(
    model: DenseModel, chooser: Chooser | None, tokenizer: Tokenizer, items: Sequence[Item]
) -> list[list[tuple[float, bool]]]:
    """Each choice's summed log-probability, and whether all its tokens are the greedy ones."""
    sequences: list[list[int]] = []
    lengths: list[int] = []
    limit = model.architecture.max_positions
    for item in items:
        context = tokenizer.encode(item.context).ids
        for choice in item.choices:
            continuation = tokenizer.encode(choice, add_special_tokens=False).ids
            sequences.append((context + continuation)[-limit:])
            lengths.append(min(len(continuation), len(sequences[-1]) - 1))
    scored = iter(zip(score(model, sequences, chooser), sequences, lengths, strict=True))
    return [[_choice(*next(scored)) for _ in item.choices] for item in items]


def _choice(scored: Scored, tokens: list[int], length: int) -> tuple[float, bool]:
    greedy = np.equal(scored.likeliest[-length:], tokens[-length:]).all()
    return float(scored.logprobs[-length:].sum()), bool(greedy)
