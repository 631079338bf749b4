"""The tokenizer, chat template and end tokens that a GGUF file holds in its metadata.

Two of llama.cpp's kinds are built: "gpt2", a byte-level BPE, whose way to split words the file names in
`tokenizer.ggml.pre`, and "llama", a SentencePiece BPE. Of the ways to split, those are known that published
models of the supported architectures use; another is refused by name, because it would cut silently
otherwise.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tokenizers import pre_tokenizers

from storage.errors import CheckpointError, UnsupportedModel
from storage.gguf.header import Metadata
from storage.vocabulary import SPACE, WORDS, Pieces, Vocabulary, byte_level, numbered, sentence_pieces

GGML = "tokenizer.ggml"
TEMPLATE = "tokenizer.chat_template"
SAMPLING = {
    "temperature": "general.sampling.temp",
    "top_p": "general.sampling.top_p",
    "top_k": "general.sampling.top_k",
}
BYTES, PIECES = "gpt2", "llama"  # kinds of tokenizer
UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 2, 3, 4, 5, 6  # types of a token

# `tokenizer.ggml.pre` -> the way to split.
SPLITS: dict[str, tuple[str, ...]] = {
    "gpt-2": ("gpt-2", "gpt2", "default", "mpt", "olmo", "phi-2", "jais", "trillion", "mellum"),
    "digits": ("smollm", "refact", "starcoder", "codeshell", "command-r", "exaone", "minerva-7b"),
    "llama-3": ("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0"),
    "dbrx": ("dbrx", "smaug-bpe"),
    "qwen-2": ("qwen2", "deepseek-r1-qwen", "megrez", "kormo"),
    "tekken": ("tekken",),
    "gpt-4o": ("gpt-4o", "llama4", "kanana2"),
    "falcon": ("falcon",),
}
# Files older than that key do not say; of these architectures there is only one way.
OLD_SPLITS = {
    "falcon": "falcon",
    "qwen2": "qwen2",
    "qwen2moe": "qwen2",
    "qwen3": "qwen2",
    "qwen3moe": "qwen2",
}
BEGINS = ("llama-3", "tekken")  # a text begins with the first token unless the file says otherwise
GEMMAS = ("gemma2", "gemma3")

# What ends an answer in one published model or another, whatever id the file calls the end; as in llama.cpp.
ENDS = (
    "<|eot_id|>",
    "<|im_end|>",
    "<|end|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<|eom_id|>",
    "<EOT>",
)


@dataclass(frozen=True, slots=True)
class GgufTokenizer:
    """What the metadata say."""

    metadata: Metadata
    architecture: str

    @property
    def present(self) -> bool:
        return self.metadata.has(f"{GGML}.tokens")

    def end_tokens(self) -> list[int]:
        """The end of a text first, then whatever else ends an answer."""
        found = [self._id(name) for name in ("eos_token_id", "eot_token_id", "eom_token_id")]
        if self.present:
            tokens, kinds = self.metadata.texts(f"{GGML}.tokens"), self._kinds()
            special = {tokens[index] for index in np.flatnonzero(kinds == CONTROL)} & set(ENDS)
            found += [tokens.index(end) for end in ENDS if end in special]
        return list(dict.fromkeys(index for index in found if index is not None))

    def generation(self) -> dict[str, Any]:
        """`generation_config.json`: end tokens, and sampling where the file advises one."""
        ends = self.end_tokens()
        found: dict[str, Any] = {"eos_token_id": ends} if ends else {}
        for ours, theirs in SAMPLING.items():
            if self.metadata.has(theirs):
                number = self.metadata.number if ours == "top_k" else self.metadata.real
                found |= {"do_sample": True, ours: number(theirs)}
        return found

    def json(self) -> str:
        """`tokenizer.json`. Raises CheckpointError, and UnsupportedModel for another kind."""
        try:
            return self._sentence_pieces() if self._kind == PIECES else self._byte_level()
        except CheckpointError as error:
            raise CheckpointError(f"{self.metadata.path} has a damaged tokenizer: {error}") from error

    def config(self) -> dict[str, Any]:
        """`tokenizer_config.json`: the tokens that a chat template asks for by name."""
        tokens = self.metadata.texts(f"{GGML}.tokens")
        named = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
        ids = {ours: self._id(f"{theirs}_token_id") for ours, theirs in named.items()}
        found = {f"{name}_token": tokens[index] for name, index in ids.items() if index is not None}
        return {**found, "add_bos_token": self._first is not None}

    def template(self) -> str | None:
        return self.metadata.text(TEMPLATE) if self.metadata.has(TEMPLATE) else None

    def _byte_level(self) -> str:
        tokens, kinds = self.metadata.texts(f"{GGML}.tokens"), self._kinds()
        alphabet = set(pre_tokenizers.ByteLevel.alphabet())
        spelled = [
            token if kind in {CONTROL, USER_DEFINED} or alphabet.issuperset(token) else _in_bytes(token)
            for token, kind in zip(tokens, kinds.tolist(), strict=True)
        ]
        merges = [_pair(merge) for merge in self.metadata.texts(f"{GGML}.merges")]
        return byte_level(self._vocabulary(spelled, kinds), merges, WORDS[self._split])

    @property
    def _kind(self) -> str:
        kind = self.metadata.text(f"{GGML}.model", "")
        if kind not in {BYTES, PIECES}:
            raise UnsupportedModel(
                f"{self.metadata.path}: a tokenizer of the kind {kind!r} is not supported; supported are "
                f"{BYTES} and {PIECES}"
            )
        return kind

    @property
    def _split(self) -> str:
        name = self.metadata.text(f"{GGML}.pre", OLD_SPLITS.get(self.architecture, "default"))
        for split, names in SPLITS.items():
            if name in names:
                return split
        raise UnsupportedModel(
            f"{self.metadata.path}: a tokenizer that splits words like {name!r} (tokenizer.ggml.pre) is not "
            f"supported; supported are {', '.join(name for names in SPLITS.values() for name in names)}"
        )

    def _sentence_pieces(self) -> str:
        tokens, kinds = self.metadata.texts(f"{GGML}.tokens"), self._kinds()
        gemma = self.architecture in GEMMAS
        if gemma:  # the file has their tokens of several spaces as spaces, and no useful scores
            tokens = [SPACE * len(token) if token and not token.strip(" ") else token for token in tokens]
            scores: Sequence[float] = range(0, -len(tokens), -1)
        else:
            scores = self.metadata.numbers(f"{GGML}.scores", len(tokens)).tolist()
        vocabulary = self._vocabulary(tokens, kinds)
        return sentence_pieces(
            vocabulary,
            Pieces(
                scores=scores,
                merged=[kind not in {UNKNOWN, CONTROL, UNUSED, BYTE} for kind in kinds.tolist()],
                space_first=self.metadata.flag(f"{GGML}.add_space_prefix", not gemma),
                every_segment=self.architecture == "phi3",
            ),
        )

    def _vocabulary(self, tokens: Sequence[str], kinds: np.ndarray[Any, Any]) -> Vocabulary:
        first, unknown = self._first, self._id("unknown_token_id")
        whole = [tokens[index] for index in np.flatnonzero(kinds == USER_DEFINED).tolist()]
        return Vocabulary(
            numbered(tokens),
            special=[tokens[index] for index in np.flatnonzero(kinds == CONTROL).tolist()],
            whole=[token for token in whole if set(token) != {SPACE}],  # Gemma's spaces are merged
            first=None if first is None else tokens[first],
            unknown=None if unknown is None else tokens[unknown],
        )

    @property
    def _first(self) -> int | None:
        """The token before every text; the kind's habit where the file does not say."""
        begins = self._kind == PIECES or self._split in BEGINS
        return self._id("bos_token_id") if self.metadata.flag(f"{GGML}.add_bos_token", begins) else None

    def _kinds(self) -> np.ndarray[Any, Any]:
        """Of every token; a file without them has ordinary ones only."""
        count = len(self.metadata.texts(f"{GGML}.tokens"))
        if not self.metadata.has(f"{GGML}.token_type"):
            return np.ones(count, np.int32)
        return self.metadata.numbers(f"{GGML}.token_type", count)

    def _id(self, key: str) -> int | None:
        """Raises CheckpointError for a token that the vocabulary does not have."""
        name = f"{GGML}.{key}"
        if not self.metadata.has(name):
            return None
        index = self.metadata.number(name)
        if self.present and index >= len(self.metadata.texts(f"{GGML}.tokens")):
            raise CheckpointError(f"{self.metadata.path}: {name} {index} is no token of its vocabulary")
        return index


def texts(tokenizer: GgufTokenizer) -> dict[str, bytes]:
    """The files of a checkpoint that are not weights, by name; none for a file without a tokenizer."""
    generation = tokenizer.generation()
    files = {"generation_config.json": json.dumps(generation).encode()} if generation else {}
    if not tokenizer.present:
        return files
    files["tokenizer.json"] = tokenizer.json().encode()
    files["tokenizer_config.json"] = json.dumps(tokenizer.config(), ensure_ascii=False, indent=2).encode()
    template = tokenizer.template()
    if template is not None:
        files["chat_template.jinja"] = template.encode()
    return files


def _pair(merge: str) -> tuple[str, str]:
    left, _, right = merge.partition(" ")
    return left, right


def _in_bytes(token: str) -> str:
    """A token in the alphabet of the byte-level kind."""
    return "".join(_SPELLING[byte] for byte in token.encode())


def _spelling() -> list[str]:
    """GPT-2's character for each byte: itself where it can be seen, else the next one from U+0100 on."""
    seen = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte if byte in seen else next(others)) for byte in range(256)]


_SPELLING = _spelling()
