"""The mixture that is shipped: found by its name, small, the one that its page tells of, exact in a ring."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
from decoding import LocalDecoder
from tokenizers import Tokenizer

from pipeline.config import Config
from pipeline.models import builtin
from pipeline.models.names import configure
from pipeline.models.stores import Source
from storage.errors import CheckpointError, UsageError
from storage.rounding import read_cost
from storage.store import Store
from storage.tokenizer import load_tokenizer
from workers.lab.evaluation import routed

# Not of the corpus. The figures below are of these words.
TEXT = """Once upon a time, there was a little girl named Mia. She lived in a small house near a big \
lake. Every \
morning she went down to the water with her dog, Max. One day they found an old boat in the tall grass. \
It was blue, and it had a hole in it. "Can we fix it?" asked Mia. Her grandpa looked at the boat and \
smiled. "Yes, but it will take time," he said. So they worked together. They cut the wood and painted the \
boat. Max slept in the sun. After many days the boat was ready. Mia and her grandpa sat in it, and Max \
jumped in too. The wind was soft and the water was bright. "We made this," said Mia, and she was very \
proud. When the stars came out, they went home and ate warm soup. Mia told her mom about the boat, and \
then she fell asleep."""
NATS = 2.5649  # a token of TEXT, in the shipped bits
SHA256 = "bf0d321b157ccc83a7e489b58083ed005fd95aa9a5421f1ab444de7e8050055b"


@pytest.fixture(scope="module")
def model() -> tuple[Source, Config]:
    return configure(builtin.MIXTURE, None, ())


@pytest.fixture(scope="module")
def store(model: tuple[Source, Config]) -> Store:
    return model[0].open_store()


def test_the_file_is_small_and_the_one_of_the_page(model: tuple[Source, Config]) -> None:
    source, config = model
    assert source == Source(builtin.MIXTURE, file=builtin.MIXTURE_FILE)
    assert config.model.checkpoint == builtin.MIXTURE
    data = builtin.MIXTURE_FILE.read_bytes()
    assert len(data) < 12_000_000
    assert hashlib.sha256(data).hexdigest() == SHA256


def test_a_missing_file_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builtin, "MIXTURE_FILE", tmp_path / "moe.gguf")
    with pytest.raises(CheckpointError, match=r"missing from .*moe\.gguf; install flashring again"):
        configure(builtin.MIXTURE, None, ())


def test_it_is_a_mixture_in_four_bits(store: Store) -> None:
    layers = store.architecture.layers
    assert len(layers) == 8
    assert {(layer.ffn.units, layer.ffn.router and layer.ffn.router.top_k) for layer in layers} == {(32, 4)}
    assert {row.codec for layer in store.layout.layers for row in layer.unit.rows} == {"q4"}
    cost = read_cost(store)
    assert cost is not None
    assert cost.bits == 4
    assert 0 < cost.perplexity < 0.01  # docs/lowbits.md


def test_its_tokenizer_is_the_builtin_models(store: Store) -> None:
    ours = load_tokenizer(store)
    shared = Tokenizer.from_file(str(builtin.CHECKPOINT / "tokenizer.json"))
    for text in (TEXT, "", "  two\n\nlines, 3.14 naïve — “so”", "</s> <pad>"):
        assert ours.encode(text).ids == shared.encode(text).ids
    ids = shared.encode(TEXT).ids
    assert ours.decode(ids) == shared.decode(ids) == TEXT


def test_its_nats_are_those_that_were_measured(store: Store) -> None:
    ids = load_tokenizer(store).encode(TEXT).ids
    with LocalDecoder(store, context=256) as decoder:
        logits = decoder.prefill(ids).astype(np.float64)[:-1]
    shifted = logits - logits.max(axis=1, keepdims=True)
    logs = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    nats = -logs[np.arange(len(ids) - 1), ids[1:]].mean()
    assert nats == pytest.approx(NATS, abs=1e-3)


@pytest.mark.ring
def test_its_log_probabilities_are_the_same_numbers_with_few_experts_in_memory(
    store: Store, model: tuple[Source, Config]
) -> None:
    ids = load_tokenizer(store).encode(TEXT).ids[:65]
    found = routed.compare(store, model[1].replace(cache={"slots_per_layer": 6}), ids)
    assert (found.tokens, found.slots) == (64, 6 / 32)
    assert found.read_bytes > 0
    assert (found.different, found.largest) == (0, 0)
    assert found.perplexity == found.perplexity_all
    assert 1 < found.perplexity < 100


def test_what_cannot_be_compared_is_refused(store: Store, model: tuple[Source, Config]) -> None:
    with pytest.raises(UsageError, match="1 tokens with the first one: builtin-moe takes 2 to 1280"):
        routed.compare(store, model[1], [2])
