"""Every form in which a tokenizer is published gives the ids that transformers gives for a plain call."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from checkpoints import make_tokenizer
from tokenizers import Tokenizer

from storage.errors import CheckpointError
from storage.tokenizer import TOKENIZER, texts

TEXTS = ("Hello", "<|user|>Hello <|end|> there", " a<think>b </s><|user|>", "<pad>x<s> [NEW] <image>", "")
FLAGS = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
USER = {"content": "<|user|>", **FLAGS, "special": True}
FAST = {"tokenizer_class": "PreTrainedTokenizerFast"}
NAMES = {"bos_token": "</s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
Files = dict[str, dict[str, Any]]


def assert_ids_are_transformers(directory: Path) -> None:
    from transformers import AutoTokenizer

    ours = Tokenizer.from_str(texts(directory)[TOKENIZER].decode())
    theirs = AutoTokenizer.from_pretrained(directory)
    for text in TEXTS:
        assert ours.encode(text).ids == theirs(text)["input_ids"], text
        plain = theirs(text, add_special_tokens=False)["input_ids"]
        assert ours.encode(text, add_special_tokens=False).ids == plain, text


def write(directory: Path, files: Files) -> None:
    (directory / "config.json").write_text(json.dumps({"model_type": "llama"}))
    for name, content in files.items():
        (directory / f"{name}.json").write_text(json.dumps(content))


BESIDE: dict[str, Files] = {
    "nothing": {},
    "names": {"tokenizer_config": {**FAST, **NAMES}},
    "the token to begin with, which the file itself decides": {
        "tokenizer_config": {
            **FAST,
            **NAMES,
            "bos_token": "<s>",
            "add_bos_token": False,
            "add_eos_token": True,
        }
    },
    "a table": {"tokenizer_config": {**FAST, **NAMES, "added_tokens_decoder": {"260": USER}}},
    "a table that changes a token": {
        "tokenizer_config": {
            **FAST,
            "added_tokens_decoder": {
                "1": {"content": "<pad>", **FLAGS, "lstrip": True, "special": False},
                "260": {**USER, "special": False, "rstrip": True, "normalized": True},
                "261": {"content": "<|end|>", **FLAGS, "lstrip": True, "special": True},
            },
        }
    },
    "a table in the wrong order": {
        "tokenizer_config": {
            **FAST,
            "added_tokens_decoder": {"261": USER, "260": {**USER, "content": "<|end|>"}},
        }
    },
    "a table with a gap": {"tokenizer_config": {**FAST, "added_tokens_decoder": {"300": USER}}},
    "older files": {
        "tokenizer_config": {**FAST, **NAMES},
        "added_tokens": {"<|user|>": 260, "<think>": 261, "<|end|>": 262},
        "special_tokens_map": {
            "eos_token": {"content": "<|end|>", **FLAGS},
            "additional_special_tokens": ["<|user|>"],
        },
    },
    "older files, which a table replaces": {
        "tokenizer_config": {**FAST, **NAMES, "added_tokens_decoder": {"260": USER}},
        "added_tokens": {"<think>": 261},
        "special_tokens_map": {"pad_token": "[NEW]"},
    },
    "a name for a new token": {"tokenizer_config": {**FAST, **NAMES, "pad_token": "[NEW]"}},
    "a name of the model's own": {"tokenizer_config": {**FAST, **NAMES, "image_token": "<image>"}},
    "more special tokens": {
        "tokenizer_config": {**FAST, **NAMES, "additional_special_tokens": ["<|user|>", "<|end|>"]}
    },
    "more special tokens by names": {
        "tokenizer_config": {**FAST, **NAMES, "extra_special_tokens": {"image_token": "<image>"}}
    },
}


@pytest.mark.parametrize("beside", BESIDE)
@pytest.mark.parametrize("saved", ["plain", "padded", "cut"])
def test_what_stands_beside_a_tokenizer_counts(beside: str, saved: str, tmp_path: Path) -> None:
    if saved != "plain" and beside not in ("nothing", "a table"):
        return
    tokenizer = make_tokenizer()
    if saved == "padded":
        tokenizer.enable_padding(length=64, pad_id=1, pad_token="<pad>")
    elif saved == "cut":
        tokenizer.enable_truncation(max_length=6)
    tokenizer.save(str(tmp_path / TOKENIZER))
    write(tmp_path, BESIDE[beside])
    assert_ids_are_transformers(tmp_path)


def test_a_tokenizer_that_lacks_nothing_is_taken_over_byte_for_byte(tmp_path: Path) -> None:
    make_tokenizer().save(str(tmp_path / TOKENIZER))
    write(tmp_path, BESIDE["names"])
    assert texts(tmp_path)[TOKENIZER] == (tmp_path / TOKENIZER).read_bytes()


GPT2, QWEN = {"tokenizer_class": "GPT2Tokenizer"}, {"tokenizer_class": "Qwen2TokenizerFast"}
BOTH = {"add_bos_token": True, "add_eos_token": True}
OLD: dict[str, Files] = {
    "GPT-2": {"tokenizer_config": {**GPT2, **NAMES}},
    "its defaults": {"tokenizer_config": GPT2},
    "begins": {"tokenizer_config": {**GPT2, **NAMES, "add_bos_token": True}},
    "begins and ends": {
        "tokenizer_config": {
            **GPT2,
            **NAMES,
            "bos_token": "<s>",
            "add_bos_token": True,
            "add_eos_token": True,
        }
    },
    "begins with nothing": {
        "tokenizer_config": {**QWEN, "eos_token": "</s>", "bos_token": None, "add_bos_token": True}
    },
    "a space first": {"tokenizer_config": {**GPT2, **NAMES, "add_prefix_space": True}},
    "Qwen": {"tokenizer_config": {**QWEN, "eos_token": "<|end|>", "added_tokens_decoder": {"260": USER}}},
    "added": {
        "tokenizer_config": {**GPT2, **NAMES},
        "added_tokens": {"<|user|>": 260, "<think>": 261},
        "special_tokens_map": {"additional_special_tokens": ["<|user|>"], "bos_token": "<s>"},
    },
    "a table": {
        "tokenizer_config": {
            **GPT2,
            **NAMES,
            "added_tokens_decoder": {"260": USER, "261": {"content": "<think>", **FLAGS, "special": False}},
        }
    },
    "a new name": {"tokenizer_config": {**GPT2, **NAMES, "pad_token": "[NEW]"}},
}


@pytest.mark.parametrize("form", OLD)
def test_vocabulary_and_merges_with_what_stands_beside_them(form: str, tmp_path: Path) -> None:
    model = json.loads(make_tokenizer().to_str())["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    write(tmp_path, OLD[form])
    assert_ids_are_transformers(tmp_path)


@pytest.mark.parametrize("saved", ["tokenizer.json", "vocab.json"])
def test_special_tokens_are_no_part_of_a_text(saved: str, tmp_path: Path) -> None:
    """Also those that only the older files call so."""
    tokenizer = make_tokenizer()
    if saved == TOKENIZER:
        tokenizer.save(str(tmp_path / TOKENIZER))
    else:
        tokenizer.model.save(str(tmp_path))
    write(tmp_path, OLD["added"])
    ours = Tokenizer.from_str(texts(tmp_path)[TOKENIZER].decode())
    assert ours.decode(ours.encode("a<|user|><think>b</s>").ids) == "a<think>b"


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        (TOKENIZER, "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "Git LFS pointer"),
        (TOKENIZER, "{", r"tokenizer\.json cannot be read"),
        ("tokenizer_config.json", "version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
        ("tokenizer_config.json", '{"added_tokens_decoder": [1]}', "added tokens .* cannot be read"),
        ("added_tokens.json", '{"<|user|>": "x"}', r"added tokens \(added_tokens\.json\) cannot be read"),
    ],
)
def test_what_cannot_be_read_is_one_sentence(name: str, content: str, words: str, tmp_path: Path) -> None:
    make_tokenizer().save(str(tmp_path / TOKENIZER))
    (tmp_path / name).write_text(content)
    with pytest.raises(CheckpointError, match=words):
        texts(tmp_path)
