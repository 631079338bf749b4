"""Every decoder with changed and random input, a little; `python -m workers.lab.fuzz` goes on for long."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from storage.errors import FlashringError
from workers.lab.fuzz.__main__ import run_for
from workers.lab.fuzz.targets import Target, targets

NAMES = [
    *(
        "manifest",
        "low-manifest",
        "header",
        "gguf",
        "ring-protocol",
        "serving-protocol",
        "http-chat",
        "http-completion",
    ),
    *("configuration", "chat-template", "tool-calls", "unit-sums", "low-bits", "checkpoint-config"),
    *("sentencepiece", "tokenizer-config", "dial", "shadow"),
]


@pytest.fixture(scope="module")
def every(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Target]:
    return {target.name: target for target in targets(tmp_path_factory.mktemp("fuzz"))}


def test_every_decoder_is_here(every: dict[str, Target]) -> None:
    assert list(every) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_decoder_gives_a_value_or_a_sentence(every: dict[str, Target], name: str) -> None:
    target = every[name]

    @settings(max_examples=150, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(target.inputs)
    def attempt(value: object) -> None:
        target.check(value)

    attempt()


def test_what_is_no_sentence_of_ours_is_found(tmp_path: Path) -> None:
    target = Target("bad", st.just(3), lambda value: 1 // (value - 3))
    count, _, _, problem = run_for(target, 60.0, examples=100)
    assert count > 0
    assert "ZeroDivisionError" in problem


# What was found by the command: the decoder, and the least input that showed it.
FOUND = {
    "brackets without end in a header": (
        "header",
        (300_000).to_bytes(8, "little") + b"[" * 300_000 + b"\0" * 64,
    ),
    "an infinite extent": (
        "header",
        (61).to_bytes(8, "little")
        + b'{"a":{"dtype":"F32","shape":[Infinity],"data_offsets":[0,4]}}'
        + b"\0" * 64,
    ),
    "a rope type that is no text": (
        "checkpoint-config",
        {
            "model_type": "gemma3_text",
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "vocab_size": 99,
            "max_position_embeddings": 256,
            "sliding_window": 8,
            "rope_scaling": {"rope_type": {}},
        },
    ),
}


@pytest.mark.parametrize("name", FOUND)
def test_what_was_found_is_a_sentence_now(every: dict[str, Target], name: str) -> None:
    decoder, given = FOUND[name]
    with pytest.raises(FlashringError):
        every[decoder].decode(given)
