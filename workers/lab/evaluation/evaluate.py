"""Runs an evaluation: items through the tokenizer, both models' scores, one report each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from storage.errors import UsageError
from workers.lab.evaluation.report import TaskReport, TextReport, compare_task, compare_text, judge
from workers.lab.evaluation.tasks import Item, find, load
from workers.lab.offline.chooser import RingChooser
from workers.lab.offline.dense import DenseModel
from workers.lab.offline.scoring import Scored, score

ITEMS_PER_ROUND = 256  # items between two progress reports
LONGEST_CHUNK = 512  # tokens of text that are scored in one piece
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
    chooser: RingChooser | None,
    sequences: list[list[int]],
    text_bytes: int,
    seed: int,
    progress: Progress = lambda stage, done, total: None,
) -> TextReport:
    """Perplexity of both models on the same chunks."""

    def scored(stage: str, by: RingChooser | None) -> list[Scored]:
        return score(model, sequences, by, lambda done, total: progress(stage, done, total))

    dense = scored("text, dense", None)
    sparse = scored("text, sparse", chooser) if chooser is not None else dense
    return compare_text(dense, sparse, text_bytes, seed)


def evaluate_task(
    model: DenseModel,
    chooser: RingChooser | None,
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
    model: DenseModel, chooser: RingChooser | None, tokenizer: Tokenizer, items: Sequence[Item]
) -> list[list[tuple[float, bool]]]:
    """Each choice's summed log-probability, and whether all its tokens are the greedy ones."""
    pairs: list[tuple[list[int], list[int]]] = []
    for item in items:
        context = tokenizer.encode(item.context).ids
        pairs += [(context, tokenizer.encode(one, add_special_tokens=False).ids) for one in item.choices]
    found = iter(continuations(model, chooser, pairs))
    return [[next(found) for _ in item.choices] for item in items]


def continuations(
    model: DenseModel, chooser: RingChooser | None, pairs: Sequence[tuple[list[int], list[int]]]
) -> list[tuple[float, bool]]:
    """Summed log-probability of each continuation after its context, and whether it is the greedy one.

    `pairs`: token ids of context and continuation. Where both are longer than the model's positions,
    the beginning is left out.
    """
    longest = model.architecture.max_positions + 1  # the last token is no input
    sequences = [(context + continuation)[-longest:] for context, continuation in pairs]
    lengths = [
        min(len(continuation), len(one) - 1) for (_, continuation), one in zip(pairs, sequences, strict=True)
    ]
    asked = [one for one, length in zip(sequences, lengths, strict=True) if length > 0]
    scored = iter(score(model, asked, chooser))
    return [
        _summed(next(scored), one, length) if length > 0 else (0.0, True)  # nothing to be wrong about
        for one, length in zip(sequences, lengths, strict=True)
    ]


def _summed(scored: Scored, tokens: list[int], length: int) -> tuple[float, bool]:
    """Over the last `length` tokens."""
    greedy = np.equal(scored.likeliest[-length:], tokens[-length:]).all()
    return float(scored.logprobs[-length:].sum()), bool(greedy)
