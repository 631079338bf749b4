"""Text of the built-in model: reading, tokenizing and mixing of simple English stories.

The corpus directory holds one JSON object a line (`{"text": ...}`), optionally xz-compressed:
`tinystories_train`, `storybooks_ccby`, `fairytaleqa`, `books_tier1`, `books_tier2` (`.jsonl`), and
`tinystories_valid_head.txt`, which is used for validation only.
"""

from __future__ import annotations

import json
import lzma
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

SOURCES = ("tinystories_train", "storybooks_ccby", "fairytaleqa", "books_tier1", "books_tier2")
VALIDATION = "tinystories_valid_head.txt"
VOCABULARY = 4096
BOS = 2  # OPT's numbering: <s> 0, <pad> 1, </s> 2, <unk> 3; every document begins with </s>

# Share of the tokens drawn from each source: broad English first, the simple register to finish on.
STABLE_MIX = {
    "tinystories_train": 0.45,
    "storybooks_ccby": 0.10,
    "fairytaleqa": 0.12,
    "books_tier1": 0.27,
    "books_tier2": 0.06,
}
COOLDOWN_MIX = {
    "tinystories_train": 0.72,
    "storybooks_ccby": 0.13,
    "fairytaleqa": 0.05,
    "books_tier1": 0.10,
    "books_tier2": 0.0,
}


def _open(directory: Path, name: str) -> str:
    plain = directory / name
    if plain.exists():
        return plain.read_text(encoding="utf-8")
    packed = directory / f"{name}.xz"
    if packed.exists():
        return lzma.decompress(packed.read_bytes()).decode("utf-8")
    raise FileNotFoundError(f"the corpus directory {directory} has neither {name} nor {name}.xz")


def records(directory: Path, source: str) -> list[dict[str, Any]]:
    """One source's records: `text`, and where known `title`, `author`, `license`, `source`."""
    lines = _open(directory, f"{source}.jsonl").split("\n")  # not splitlines: texts hold U+2028
    return [json.loads(line) for line in lines if line.strip()]


def documents(directory: Path, source: str) -> list[str]:
    """The texts of one source, paragraphs separated by one newline."""
    return [str(record["text"]) for record in records(directory, source)]


def validation_stories(directory: Path) -> list[str]:
    """The held-out stories.

    The file does not mark where a story ends; a paragraph that begins "Once upon a time" starts a
    new one. Paragraphs are joined by one newline, as in the training text.
    """
    stories: list[list[str]] = []
    for line in _open(directory, VALIDATION).split("\n"):
        paragraph = line.strip()
        if not paragraph:
            continue
        if not stories or paragraph.startswith("Once upon a time"):
            stories.append([])
        stories[-1].append(paragraph)
    return ["\n".join(story) for story in stories]


def train_tokenizer(directory: Path) -> Tokenizer:
    """Byte-level BPE with OPT's special tokens, trained on the simpler sources."""

    def texts() -> Iterator[str]:
        for source, repeats in (("tinystories_train", 3), ("storybooks_ccby", 3), ("fairytaleqa", 1)):
            for _ in range(repeats):
                yield from documents(directory, source)
        for book in documents(directory, "books_tier1"):
            yield book[:60_000]  # the head of every book, so that no single one shapes the vocabulary

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<s>", "<pad>", "</s>", "<unk>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts(), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="</s> $A", pair="</s> $A $B", special_tokens=[("</s>", BOS)]
    )
    return tokenizer


def encode_all(tokenizer: Tokenizer, texts: list[str]) -> npt.NDArray[np.uint16]:
    """All texts as one stream of token ids, each text preceded by `</s>`."""
    encoded = tokenizer.encode_batch_fast(texts)
    return np.concatenate([np.array(one.ids, np.uint16) for one in encoded])


@dataclass(frozen=True)
class Mixture:
    """Token streams of every source, drawn from by share."""

    streams: dict[str, npt.NDArray[np.uint16]]

    @classmethod
    def prepare(cls, directory: Path, tokenizer: Tokenizer, cache: Path) -> Mixture:
        """Tokenize every source once; later calls read the cached `.npy` streams."""
        streams = {}
        for source in SOURCES:
            path = cache / f"{source}.npy"
            if not path.exists():
                np.save(path, encode_all(tokenizer, documents(directory, source)))
            streams[source] = np.load(path, mmap_mode="r")
        return cls(streams)

    def batch(
        self, step: int, seed: int, mix: dict[str, float], rows: int, length: int
    ) -> npt.NDArray[np.int64]:
        """`[rows, length + 1]` token ids; a pure function of (seed, step), so that runs can resume."""
        generator = np.random.default_rng((seed, step))
        names = list(mix)
        shares = np.array([mix[name] for name in names])
        chosen = generator.choice(len(names), size=rows, p=shares / shares.sum())
        out = np.empty((rows, length + 1), np.int64)
        for row, which in enumerate(chosen):
            stream = self.streams[names[which]]
            start = int(generator.integers(0, len(stream) - length - 1))
            out[row] = stream[start : start + length + 1]
        return out
