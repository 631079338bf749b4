"""Model names: presets, directories, hub ids, and the cache of converted stores."""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import NoReturn

import numpy as np
import pytest
from checkpoints import write_checkpoint
from gguf_files import of_checkpoint
from safetensors.numpy import save_file

from pipeline.models import builtin as builtin_model
from pipeline.models.hub import download
from pipeline.models.names import configure, find_source, presets
from pipeline.models.stores import Source
from storage import files, texts
from storage.errors import CheckpointError, StoreError, StoreIncomplete, UsageError
from storage.manifest import BUNDLES, PREDICTORS, RESIDENT
from storage.predictors import SUM, check_sum
from storage.rounding import read_cost, write_cost
from storage.tensors import Tensors
from storage.verify import verify


@pytest.fixture(scope="module")
def shipped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny", "opt", "float16")


@pytest.fixture
def checkpoint(shipped: Path, tmp_path: Path) -> Path:
    """A checkpoint that a test may change."""
    return Path(shutil.copytree(shipped, tmp_path / "tiny"))


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FLASHRING_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def hub(checkpoint: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A Hugging Face cache that holds org/tiny, as a finished download leaves it."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    repository = tmp_path / "hub" / "models--org--tiny"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("abc")
    shutil.copytree(checkpoint, repository / "snapshots" / "abc")
    return repository


def test_presets_name_their_hub_ids() -> None:
    assert find_source("opt-6.7b") == Source("opt-6.7b", hub_id="facebook/opt-6.7b")
    assert find_source("falcon-rw-1b").hub_id == "tiiuae/falcon-rw-1b"


def test_any_hub_id_is_a_source() -> None:
    assert find_source("org/some-model.v2") == Source("some-model.v2", hub_id="org/some-model.v2")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("opt-6.8b", r"unknown model 'opt-6.8b'; did you mean opt-6.7b"),
        ("Falcon7b", r"did you mean falcon-7b"),
        ("zzz", r"known are builtin-moe, builtin, .*opt-125m"),
        ("./nowhere", r"there is no directory \./nowhere"),
        ("/no/such/place", r"there is no directory"),
    ],
)
def test_an_unknown_name_is_refused_with_the_nearest(name: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        find_source(name)


def test_a_directory_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="neither a store"):
        find_source(str(tmp_path))


def test_a_file_that_is_no_gguf_is_refused_as_that(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "model.safetensors").write_bytes(b"")
    monkeypatch.chdir(tmp_path)  # where the second name is like an id of the hub
    for name in (str(tmp_path / "parts" / "model.safetensors"), "parts/model.safetensors"):
        with pytest.raises(UsageError, match=r"is a file, but no \.gguf"):
            find_source(name)


@pytest.mark.parametrize("name", [".", "/"])
def test_a_directory_without_a_name_of_its_own_is_one_as_any(
    name: str, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(checkpoint.parent)
    with pytest.raises(UsageError, match="neither a store"):
        find_source(name)
    monkeypatch.chdir(checkpoint)
    assert find_source(".") == Source("tiny", directory=checkpoint.resolve())


def test_an_interrupted_conversion_is_said_to_be_one(tmp_path: Path) -> None:
    (tmp_path / "store.partial").mkdir()
    with pytest.raises(StoreIncomplete, match="interrupted"):
        find_source(str(tmp_path / "store")).open_store()


def test_a_checkpoint_is_converted_once(
    checkpoint: Path, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = find_source(str(checkpoint)).open_store()
    assert "converting tiny" in capsys.readouterr().err
    assert first.path.parent == home / "stores"
    again = find_source(str(checkpoint)).open_store()
    assert again.path == first.path
    assert capsys.readouterr().err == ""
    assert find_source(str(first.path)).open_store().path == first.path


def test_a_gguf_file_is_converted_once_and_again_when_it_changes(tmp_path: Path, home: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "gated", "llama")
    file = of_checkpoint(checkpoint, tmp_path / "some model.gguf")
    source = find_source(str(file))
    assert source == Source("some model", file=file)
    first = source.open_store()
    assert (first.path.parent, first.architecture.family) == (home / "stores", "llama")
    assert configure("", None, [f"model.checkpoint={file}"])[0].open_store().path == first.path
    of_checkpoint(write_checkpoint(tmp_path / "gated", "llama", seed=1), file)
    second = find_source(str(file)).open_store()
    assert second.path != first.path
    assert second.identity != first.identity
    with pytest.raises(UsageError, match=r"there is no file .*absent\.gguf"):
        find_source(str(tmp_path / "absent.gguf"))


def test_a_changed_checkpoint_is_converted_again(checkpoint: Path) -> None:
    first = find_source(str(checkpoint)).open_store()
    write_checkpoint(checkpoint, "opt", "float16", seed=1)
    second = find_source(str(checkpoint)).open_store()
    assert second.path != first.path
    assert second.identity != first.identity


@pytest.mark.parametrize("name", ["chat_template.jinja", "generation_config.json", "tokenizer_config.json"])
def test_a_changed_text_reaches_the_store_without_a_conversion(
    name: str, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = find_source(str(checkpoint)).open_store()
    weights = {file: (first.path / file).stat().st_ino for file in (BUNDLES, RESIDENT)}
    ends = json.loads((checkpoint / "generation_config.json").read_text()).get("eos_token_id")
    text = json.dumps({"eos_token_id": ends, "temperature": 0.5})
    (checkpoint / name).write_text(text)
    capsys.readouterr()
    second = find_source(str(checkpoint)).open_store()
    assert capsys.readouterr().err == ""
    assert second.path == first.path
    assert (second.path / name).read_text() == text
    assert {file: (second.path / file).stat().st_ino for file in weights} == weights
    verify(second.path)
    (checkpoint / name).unlink()
    if name != "generation_config.json":  # whose end tokens are computed with
        assert not (find_source(str(checkpoint)).open_store().path / name).exists()


def test_another_end_token_makes_another_store(checkpoint: Path) -> None:
    before = find_source(str(checkpoint)).cached_store()
    (checkpoint / "generation_config.json").write_text('{"eos_token_id": [2, 7]}')
    assert find_source(str(checkpoint)).cached_store() != before


def test_what_no_conversion_reads_neither_converts_again_nor_is_in_the_way(checkpoint: Path) -> None:
    first = find_source(str(checkpoint)).open_store()
    for name in ("notes.txt", "trainer_state.json", "optimizer.bin", "adapter_model.safetensors"):
        (checkpoint / name).write_text("what a training leaves")
    for name in ("dangling.json", "dangling.safetensors"):
        (checkpoint / name).symlink_to("nowhere")
    for name in ("folder.json", "logs.txt", "checkpoint-500", "spiece.model"):
        (checkpoint / name).mkdir()
    os.mkfifo(checkpoint / "pipe.bin")
    assert find_source(str(checkpoint)).open_store().path == first.path
    assert [path.name for path in first.path.parent.iterdir() if path.is_dir()] == [first.path.name]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "has no tokenizer"),
        ("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 100\n", "Git LFS pointer"),
        ("{}", r"tokenizer\.json cannot be read"),
    ],
)
def test_a_tokenizer_that_no_run_can_use_is_refused_before_the_weights_are_converted(
    content: str | None, words: str, checkpoint: Path, home: Path
) -> None:
    good = (checkpoint / "tokenizer.json").read_bytes()
    (checkpoint / "tokenizer.json").unlink()
    if content is not None:
        (checkpoint / "tokenizer.json").write_text(content)
    with pytest.raises(CheckpointError, match=words):
        find_source(str(checkpoint)).open_store()
    assert not (home / "stores").exists()
    (checkpoint / "tokenizer.json").write_bytes(good)
    store = find_source(str(checkpoint)).open_store()
    (checkpoint / "tokenizer.json").write_text(content or "{}")  # broken later: said, not ignored
    with pytest.raises(CheckpointError):
        find_source(str(checkpoint)).open_store()
    (checkpoint / "tokenizer.json").write_bytes(good)
    assert find_source(str(checkpoint)).open_store().path == store.path


def test_a_damaged_manifest_is_said_to_be_one_also_where_texts_are_new(checkpoint: Path) -> None:
    store = find_source(str(checkpoint)).open_store()
    (store.path / "manifest.json").write_text("{")
    (checkpoint / "chat_template.jinja").write_text("{{ messages }}")
    with pytest.raises(StoreError, match=r"manifest\.json cannot be read"):
        find_source(str(checkpoint)).open_store()


def test_a_renewal_that_was_killed_is_done_again(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = find_source(str(checkpoint)).open_store()
    (checkpoint / "chat_template.jinja").write_text("{{ messages }}")
    (checkpoint / "special_tokens_map.json").write_text("{}")
    written: list[Path] = []

    def killed(path: Path, data: bytes, *, shared: bool = False) -> None:
        if written:
            raise SystemExit
        written.append(path)
        files.write_whole(path, data, shared=shared)

    monkeypatch.setattr(texts, "write_whole", killed)
    with pytest.raises(SystemExit):
        find_source(str(checkpoint)).open_store()
    monkeypatch.undo()
    monkeypatch.setenv("FLASHRING_HOME", str(store.path.parent.parent))
    verify(find_source(str(checkpoint)).open_store().path)


def test_a_downloaded_checkpoint_needs_no_network_and_its_store_not_even_the_checkpoint(
    hub: Path, home: Path
) -> None:
    first = find_source("org/tiny").open_store()
    assert first.path == home / "stores" / "org--tiny"
    shutil.rmtree(hub)
    assert find_source("org/tiny").open_store().identity == first.identity


def test_a_checkpoint_that_cannot_be_fetched_is_said_how_to_fetch() -> None:
    with pytest.raises(CheckpointError) as error:
        find_source("opt-6.7b").open_store()
    sentence = str(error.value)
    assert "`hf download facebook/opt-6.7b --local-dir opt-6.7b`" in sentence
    assert "`--model ./opt-6.7b`" in sentence


def test_a_download_without_weights_counts_as_none(hub: Path) -> None:
    next(hub.glob("snapshots/*/model.safetensors")).unlink()
    with pytest.raises(CheckpointError, match="hf download org/tiny"):
        find_source("org/tiny").open_store()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES])
def test_a_download_that_cannot_be_kept_is_not_said_to_be_unreachable(
    number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    def refuse(*_: object, **__: object) -> str:
        raise OSError(number, "the reason")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *_, **__: SimpleNamespace(siblings=[]))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(CheckpointError, match=r"cannot be fetched into .* HF_HOME moves: the reason$"):
        download("org/tiny")


def answered(kind: str, status: int) -> Exception:
    """What huggingface_hub raises for an answer of the hub's."""
    import huggingface_hub.errors

    http = sys.modules[huggingface_hub.errors.HfHubHTTPError.__mro__[1].__module__.partition(".")[0]]
    response = http.Response(status, request=http.Request("GET", "https://huggingface.co"))
    return getattr(huggingface_hub.errors, kind)("the hub's own words", response=response)


@pytest.mark.parametrize(
    ("kind", "status", "words"),
    [
        (
            "GatedRepoError",
            403,
            r"accept it on https://huggingface\.co/org/tiny, log in with `hf auth login`",
        ),
        (
            "RepositoryNotFoundError",
            404,
            r"no model org/tiny .*check the name, or log in with `hf auth log",
        ),
        ("HfHubHTTPError", 401, r"refuses your token for org/tiny: log in with `hf auth login`"),
    ],
)
@pytest.mark.parametrize("at", ["model_info", "snapshot_download"])
def test_what_the_hub_does_not_give_is_said_how_to_get(
    kind: str, status: int, words: str, at: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    def refuse(*_: object, **__: object) -> NoReturn:
        raise answered(kind, status)

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *_, **__: SimpleNamespace(siblings=[]))
    whose = huggingface_hub.HfApi if at == "model_info" else huggingface_hub
    monkeypatch.setattr(whose, at, refuse)
    with pytest.raises(UsageError, match=words):
        download("org/tiny")


SMALL = ["config.json", "generation_config.json", "tokenizer.json", "merges.txt", "chat_template.jinja"]


def fetched_of(
    listed: list[str],
    monkeypatch: pytest.MonkeyPatch,
    place: Path,
    shards: dict[str, list[str]] | None = None,
) -> list[str]:
    """What is fetched of a repository that lists these files; `shards` by the index that names them."""
    import huggingface_hub
    from huggingface_hub.utils import filter_repo_objects

    siblings = [SimpleNamespace(rfilename=name) for name in listed]
    chosen: set[str] = set()

    def fetch(_: str, *, allow_patterns: list[str]) -> str:
        chosen.update(filter_repo_objects(listed, allow_patterns=allow_patterns))
        for index, names in (shards or {}).items():
            if index in chosen:
                weight_map = {str(number): name for number, name in enumerate(names)}
                (place / index).write_text(json.dumps({"weight_map": weight_map}))
        return str(place)

    monkeypatch.setattr(
        huggingface_hub.HfApi, "model_info", lambda *_, **__: SimpleNamespace(siblings=siblings)
    )
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    download("org/tiny")
    return sorted(chosen)


@pytest.mark.parametrize(
    ("others", "needed"),
    [
        (
            ["model.safetensors", "pytorch_model.bin", "flax_model.msgpack", "tf_model.h5"],
            "model.safetensors",
        ),
        (
            ["pytorch_model.bin", "checkpoint-500/model.safetensors", "checkpoint-500/config.json"],
            "pytorch_model.bin",
        ),
        (["pytorch_model.bin", "adapter_model.safetensors"], "pytorch_model.bin"),
        (["pytorch_model.bin", "model.fp16.safetensors"], "pytorch_model.bin"),
        (
            ["pytorch_model.bin", "pytorch_model.fp16.bin", "training_args.bin", "optimizer.bin"],
            "pytorch_model.bin",
        ),
        (["model.safetensors", "original/consolidated.00.pth", "original/config.json"], "model.safetensors"),
        (["model.safetensors", "consolidated.safetensors", "onnx/model.safetensors"], "model.safetensors"),
        (["pytorch_model.bin", "openvino/tokenizer.json", "a/b/tokenizer.model"], "pytorch_model.bin"),
    ],
)
def test_only_the_models_own_weights_at_the_top_are_fetched(
    others: list[str], needed: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert fetched_of([*SMALL, needed, *others], monkeypatch, tmp_path) == sorted([*SMALL, needed])


@pytest.mark.parametrize(
    ("form", "ending"), [("model.safetensors", "safetensors"), ("pytorch_model.bin", "bin")]
)
def test_of_a_model_in_shards_those_are_fetched_that_its_index_names(
    form: str, ending: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    index = f"{form}.index.json"
    shards = [f"shard [{number}] of 2.{ending}" for number in (1, 2)]
    others = [f"model.fp16-0000{number}-of-00002.{ending}" for number in (1, 2)]
    listed = [*SMALL, index, *shards, *others, f"old/{shards[0]}"]
    found = fetched_of(listed, monkeypatch, tmp_path, {index: shards})
    assert found == sorted([*SMALL, index, *shards])


def test_named_chat_templates_are_fetched_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    listed = [*SMALL, "additional_chat_templates/tool_use.jinja", "model.safetensors"]
    assert fetched_of(listed, monkeypatch, tmp_path) == sorted(listed)


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        (["tiny.Q4_0.gguf"], r"GGUF files alone.*hf download org/tiny tiny\.Q4_0\.gguf"),
        (["checkpoint-500/model.safetensors"], "has no weights at its top"),
    ],
)
def test_a_repository_without_weights_that_are_meant(
    weights: list[str], words: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=words):
        fetched_of([*SMALL, *weights], monkeypatch, tmp_path)


def test_what_a_local_directory_holds_beside_the_model_is_not_meant(checkpoint: Path) -> None:
    store = find_source(str(checkpoint)).open_store()
    for name in ("adapter_model.safetensors", "model.fp16.safetensors", "pytorch_model.bin"):
        (checkpoint / name).write_bytes(b"another's weights")
    (checkpoint / "original").mkdir()
    (checkpoint / "original" / "model.safetensors").write_bytes(b"again")
    assert find_source(str(checkpoint)).open_store().path == store.path


@pytest.fixture
def builtin(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(builtin_model, "CHECKPOINT", checkpoint)
    return checkpoint


def test_without_a_name_it_is_the_builtin_model(builtin: Path) -> None:
    source, config = configure("", None, ["cache.window=3"])
    assert source == Source("builtin", directory=builtin)
    assert config.cache.window == 3
    assert config.model.checkpoint == "builtin"


def test_the_builtin_models_predictors_follow_it(builtin: Path) -> None:
    source, _ = configure("builtin", None, ())
    for value in (1, 2):  # the second comes without another conversion
        trained = {"x": np.full(3, value, np.float32)}
        save_file(trained, builtin / builtin_model.PREDICTORS, {"store": "of 16 bits", "kind": "lowrank"})
        store = source.open_store()
        installed = Tensors(store.predictors("default"))
        assert installed.metadata == {
            "store": store.identity,
            "kind": "lowrank",
            SUM: installed.metadata[SUM],
        }
        check_sum(installed)
        assert (installed.vector("x", (3,)) == value).all()
        assert [file.name for file in (store.path / PREDICTORS).iterdir()] == ["default.safetensors"]
    assert len(list(store.path.parent.glob("builtin-*/"))) == 1


def test_the_builtin_model_in_few_bits_has_its_predictors_and_tells_what_they_cost(builtin: Path) -> None:
    source, _ = configure("builtin", None, (), {"model": {"bits": 4}})
    save_file({"x": np.zeros(1)}, builtin / builtin_model.PREDICTORS, {"store": "of 16 bits"})
    store = source.open_store()
    assert Tensors(store.predictors("default")).metadata["store"] == store.identity
    assert read_cost(store) == builtin_model.COSTS[4]
    write_cost(store, replace(builtin_model.COSTS[4], perplexity=-0.5))  # measured again
    source.open_store()
    cost = read_cost(store)
    assert cost is not None
    assert "-50.00%" in cost.describe()
    (store.path / "quality.json").write_text("[" * 100_000)
    assert read_cost(store) is None


def test_predictors_that_cannot_be_installed_leave_nothing(
    builtin: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, _ = configure("builtin", None, ())
    store = source.open_store()
    save_file({"x": np.zeros(1)}, builtin / builtin_model.PREDICTORS, {"store": "new"})

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(StoreError, match=r"default\.safetensors cannot be written: No space left"):
        builtin_model.install(store, None)
    assert list((store.path / PREDICTORS).iterdir()) == []


def test_a_missing_builtin_model_is_said_to_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builtin_model, "CHECKPOINT", tmp_path)
    with pytest.raises(CheckpointError, match="the built-in model is missing"):
        configure("", None, ())


def test_a_directory_has_a_presets_settings_only_where_they_are_asked_for(checkpoint: Path) -> None:
    source, config = configure(str(checkpoint), None, ())
    assert config.compute.kv_cache == "float32"
    asked, config = configure(str(checkpoint), presets()["opt-6.7b"], ())
    assert config.compute.kv_cache == "float16"
    assert asked == source


def test_a_configuration_may_name_the_model(checkpoint: Path, tmp_path: Path) -> None:
    file = tmp_path / "own.toml"
    file.write_text(f'[model]\ncheckpoint = "{checkpoint}"\n[cache]\nwindow = 2\n')
    source, config = configure("", file, ())
    assert source.directory == checkpoint.resolve()
    assert config.cache.window == 2
