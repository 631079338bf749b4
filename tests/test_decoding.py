"""The model's own way of sampling: `generation_config.json` decides what nobody else says."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from checkpoints import write_checkpoint

from pipeline import cli
from pipeline.config import Config
from pipeline.planner.decoding import describe
from pipeline.planner.divide import plan
from pipeline.planner.resolve import resolve
from storage.convert import convert
from storage.errors import StoreError
from storage.store import Store

QWEN = {
    "do_sample": True,
    "temperature": 0.7,
    "top_k": 20,
    "top_p": 0.8,
    "repetition_penalty": 1.05,
    "eos_token_id": [2, 5],
}
Saying = Callable[[Any], Store]
Here = Callable[..., subprocess.CompletedProcess[str]]  # the fixture `here`


@pytest.fixture(scope="module")
def shipped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("decoding") / "tiny", "opt", "float16")


@pytest.fixture
def saying(shipped: Path, tmp_path: Path) -> Saying:
    """A store whose checkpoint has such a `generation_config.json`; None: it has none."""

    def make(generation: Any) -> Store:
        checkpoint = Path(shutil.copytree(shipped, tmp_path / "tiny"))
        file = checkpoint / "generation_config.json"
        file.unlink()
        if generation is not None:
            file.write_text(json.dumps(generation))
        return convert(checkpoint, tmp_path / "store", name="tiny")

    return make


def sampled(store: Store, config: Config) -> tuple[float, int, float]:
    chosen = resolve(store, config).config.sampling
    return chosen.temperature, chosen.top_k, chosen.top_p


def test_what_nobody_says_the_model_decides(saying: Saying) -> None:
    store = saying(QWEN)
    assert sampled(store, Config()) == (0.7, 20, 0.8)
    assert plan(store, Config()).config.sampling.max_new_tokens == 200
    assert store.architecture.eos_tokens == (2, 5)


def test_files_settings_and_options_win_key_by_key(saying: Saying, tmp_path: Path) -> None:
    store = saying(QWEN)
    preset, file = tmp_path / "preset.toml", tmp_path / "file.toml"
    preset.write_text("[sampling]\ntop_k = 5\n")
    file.write_text("[sampling]\ntop_p = 0.5\n")
    assert sampled(store, Config.load(None, preset=preset)) == (0.7, 5, 0.8)
    assert sampled(store, Config.load(file, preset=preset)) == (0.7, 5, 0.5)
    assert sampled(store, Config.load(file, ["sampling.top_p=0.6"], preset)) == (0.7, 5, 0.6)
    option = {"sampling": {"temperature": 0.0, "top_k": None}}
    assert sampled(store, Config.load(None, values=option)) == (0.0, 20, 0.8)


def test_changing_a_configuration_does_not_decide_for_the_model(saying: Saying) -> None:
    assert sampled(saying(QWEN), Config().replace(cache={"share": 0.5})) == (0.7, 20, 0.8)


@pytest.mark.parametrize(
    ("generation", "expected"),
    [
        (None, (0.0, 0, 1.0)),
        ({"_from_model_config": True, "eos_token_id": 2}, (0.0, 0, 1.0)),  # OPT's and Falcon's
        ({"do_sample": True}, (1.0, 0, 1.0)),
        ({"do_sample": False, "temperature": 0.7}, (0.0, 0, 1.0)),
        ({"temperature": 0.7, "top_p": 0.9}, (0.0, 0, 0.9)),
        ({"do_sample": True, "temperature": None, "top_k": None}, (1.0, 0, 1.0)),
    ],
)
def test_it_samples_as_in_transformers(
    saying: Saying, generation: Any, expected: tuple[float, int, float]
) -> None:
    assert sampled(saying(generation), Config()) == expected


def test_who_decides_is_told(saying: Saying) -> None:
    store = saying(QWEN)
    assert describe(store, Config()) == (
        "sampling: temperature 0.7, top-k 20, top-p 0.8; the model's generation_config.json decides "
        "temperature, top_k, top_p; not applied: its repetition_penalty 1.05"
    )
    greedy = Config.load(None, ["sampling.temperature=0"])
    assert describe(store, greedy) == "sampling: none, always the likeliest token"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"do_sample": true, "temperature": "hot"}', r"is damaged: configuration key sampling\.temperature"),
        ('{"top_p": 7}', r"is damaged: configuration key sampling\.top_p"),
        ("[1]", "is damaged: it is not a JSON object"),
        ("{", "cannot be read"),
    ],
)
def test_a_damaged_file_is_named(saying: Saying, text: str, words: str) -> None:
    store = saying(QWEN)
    (store.path / "generation_config.json").write_text(text)
    with pytest.raises(StoreError, match=rf"generation_config\.json {words}"):
        resolve(store, Config())


@pytest.mark.ring
def test_a_text_is_sampled_as_the_model_says(saying: Saying, here: Here) -> None:
    store = saying({**QWEN, "temperature": 1.5})

    def text(*options: str) -> str:
        arguments = ("--prompt", "hello", "--model", store.path, "--max-new-tokens", "12", "--ignore-eos")
        done = here(cli.main, *arguments, *options)
        assert done.returncode == 0, done.stderr
        return done.stdout

    said = text()
    assert said == text("--temperature", "1.5", "--top-k", "20", "--set", "sampling.top_p=0.8")
    assert said != text("--temperature", "0")
