"""repair: what is damaged is as it was, what is intact is not touched, another checkpoint changes nothing."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from checkpoints import write_checkpoint
from damage import contents, flip

from pipeline.cli import main
from storage import files
from storage.convert import NeuronOrder, convert
from storage.errors import StoreError, UsageError
from storage.manifest import BUNDLES, CHECKSUMS, MANIFEST, ORDER, RESIDENT
from storage.repair import Mended, repair
from storage.store import Store
from storage.verify import verify

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("repair") / "model", "opt", "float16")


@pytest.fixture(scope="module")
def original(model: Path) -> Path:
    layers, units = Store.open(convert(model, model.parent / "plain", name="tiny").path).layout.layers, None
    units = layers[0].units
    generator = np.random.default_rng(3)
    order = np.array([generator.permutation(units) for _ in layers], np.int32)
    return convert(model, model.parent / "store", name="tiny", order=NeuronOrder("random", order)).path


@pytest.fixture
def store(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "store"))


def test_an_intact_store_is_not_written_to(store: Path, model: Path) -> None:
    before = Store.open(store).state()
    assert not repair(store, model)
    assert Store.open(store).state() == before


def test_only_damaged_units_are_written(
    store: Path, original: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = Store.open(store).layout
    for layer, position in ((0, 3), (1, 0), (1, 17)):
        flip(store / BUNDLES, layout.offset(layer, position) + 5)
    with pytest.raises(StoreError, match=rf"`run.py repair {store} --from CHECKPOINT` mends it"):
        verify(store)
    monkeypatch.setattr(files, "replacing", None)  # no file is replaced as a whole
    assert repair(store, model) == Mended(((0, 3), (1, 0), (1, 17)), ())
    assert contents(store) == contents(original)


@pytest.mark.parametrize("name", [BUNDLES, RESIDENT, CHECKSUMS, "tokenizer.json"])
@pytest.mark.parametrize("how", ["flipped", "cut", "longer", "missing"])
def test_every_file_is_as_it_was(store: Path, original: Path, model: Path, name: str, how: str) -> None:
    path = store / name
    match how:
        case "flipped":
            flip(path, path.stat().st_size // 2)
        case "cut":
            os.truncate(path, path.stat().st_size // 3)
        case "longer":
            path.write_bytes(path.read_bytes() + b"more")
        case "missing":
            path.unlink()
    mended = repair(store, model)
    assert (name in mended.files) == (name != BUNDLES)
    assert contents(store) == contents(original)
    verify(store)


@pytest.mark.parametrize("what", ["architecture", "files", "name"])
def test_a_manifest_that_breaks_its_seal_is_made_anew(
    store: Path, original: Path, model: Path, what: str
) -> None:
    data = json.loads((store / MANIFEST).read_text(encoding="utf-8"))
    match what:
        case "architecture":
            data["architecture"]["bos_token"] = 7
        case "files":
            data["files"][BUNDLES]["xxh3_128"] = "0" * 32
        case "name":
            data["name"] = "tinx"
    (store / MANIFEST).write_text(json.dumps(data), encoding="utf-8")
    with pytest.raises(StoreError, match=r"manifest\.json is damaged: it does not match its own hash"):
        Store.open(store)
    assert repair(store, model).files == (MANIFEST,)
    name = json.loads((store / MANIFEST).read_text(encoding="utf-8")).pop("name")
    assert name == data["name"]
    if what != "name":  # which is for people, and in no checkpoint
        assert contents(store) == contents(original)
    verify(store)


def test_a_manifest_that_cannot_be_read_is_beyond_repair(store: Path, model: Path) -> None:
    flip(store / MANIFEST, 0)
    with pytest.raises(StoreError, match=r"damaged beyond repair.*convert the checkpoint again"):
        repair(store, model)


def test_an_order_that_was_lost_is_beyond_repair(store: Path, model: Path) -> None:
    flip(store / ORDER, 8)
    with pytest.raises(StoreError, match=r"order\.bin is damaged, and no checkpoint has it"):
        repair(store, model)


def test_another_checkpoint_is_refused(store: Path, tmp_path: Path) -> None:
    flip(store / BUNDLES, 100)
    before = contents(store)
    other = write_checkpoint(tmp_path / "other", "opt", "float16", seed=1)
    with pytest.raises(UsageError, match="was not converted from"):
        repair(store, other)
    assert contents(store) == before


def test_a_checkpoint_that_changed_where_nobody_looked_writes_nothing(
    store: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The identity samples a checkpoint; the checksums see every byte."""
    flip(store / BUNDLES, Store.open(store).layout.offset(0, 2))
    before = contents(store)
    other = write_checkpoint(tmp_path / "other", "opt", "float16", seed=1)
    same = Store.open(store).manifest.parameters["source"]
    monkeypatch.setattr("storage.checkpoint.Checkpoint.identity", lambda self: same)
    with pytest.raises(StoreError, match="the checkpoint gives other units of layer 0"):
        repair(store, other)
    assert contents(store) == before


@pytest.mark.parametrize("bits", [8, 4])
def test_stores_of_few_bits_and_of_experts(tmp_path: Path, bits: int) -> None:
    checkpoint = write_checkpoint(tmp_path / "mixture", "mixtral", "bfloat16")
    store = convert(checkpoint, tmp_path / "store", name="mixture", bits=bits)
    before = contents(store.path)
    flip(store.path / BUNDLES, store.layout.offset(1, 2) + 9)
    flip(store.path / RESIDENT, -1)
    assert repair(store.path, checkpoint) == Mended(((1, 2),), (RESIDENT,))
    assert contents(store.path) == before


# Repairs argv[1] from argv[2]; kills itself before its argv[3]-th write, sync or rename.
CHILD = """
import io, os, signal, sys
from pathlib import Path
import storage.repair
from storage.convert import units

countdown = int(sys.argv[3])
def count():
    global countdown
    countdown -= 1
    if countdown == 0:
        os.kill(os.getpid(), signal.SIGKILL)
def counted(function):
    def call(*arguments, **more):
        count()
        return function(*arguments, **more)
    return call
for name in ("fsync", "replace", "truncate", "ftruncate"):
    setattr(os, name, counted(getattr(os, name)))
chosen = units.chosen
def counting(*arguments):
    for one in chosen(*arguments):
        count()
        yield one
units.chosen = counting
storage.repair.repair(Path(sys.argv[1]), Path(sys.argv[2]))
"""


def test_a_killed_repair_is_done_again(store: Path, original: Path, model: Path) -> None:
    layout = Store.open(store).layout
    for layer in range(len(layout.layers)):
        flip(store / BUNDLES, layout.offset(layer, 11))
    flip(store / RESIDENT, -7)
    flip(store / "tokenizer.json", 40)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    killed = 0
    for nth in (1, 2, 4, 6):
        program = [sys.executable, "-c", CHILD, str(store), str(model), str(nth)]
        done = subprocess.run(program, env=environment, capture_output=True, check=False)
        killed += done.returncode == -signal.SIGKILL
    assert killed >= 3
    repair(store, model)
    assert contents(store) == contents(original)  # also: no temporary file is left


def test_the_command(
    store: Path, model: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def run(*arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["run.py", *arguments])
        status = main()
        return status, capfd.readouterr().err

    flip(store / BUNDLES, 100)
    status, said = run("repair", str(store))
    assert status == 2
    assert f"say which checkpoint {store} was converted from: --from CHECKPOINT" in said
    status, said = run("repair", str(store), "--from", str(model))
    assert status == 0
    assert f"{store} is mended: 1 unit of bundles.bin written anew" in said
    status, said = run("repair", str(store), "--from", str(model))
    assert status == 0
    assert "is intact: nothing was written" in said
