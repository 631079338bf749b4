"""`run.py stores`: what is kept, and what is removed."""

from __future__ import annotations

import fcntl
import json
import os
import time
from pathlib import Path

import pytest
from checkpoints import write_checkpoint
from typer.testing import CliRunner

from pipeline.cli import app
from pipeline.models import shelf
from pipeline.models.names import find_source
from storage.errors import UsageError


@pytest.fixture
def stores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Two of one model, in 16 and 8 bits, and an unfinished one."""
    monkeypatch.setenv("FLASHRING_HOME", str(tmp_path / "home"))
    source = find_source(str(write_checkpoint(tmp_path / "tiny", "opt", "float16")))
    first = source.open_store().path
    (tmp_path / "tiny" / "config.json").write_text(
        json.dumps({**json.loads((tmp_path / "tiny" / "config.json").read_text()), "note": "another"})
    )
    second = source.open_store().path
    (first.parent / "gone-0123.partial").mkdir()
    (first.parent / "gone-0123.partial" / "bundles.bin").write_bytes(bytes(10))
    return [first, second]


def run(*arguments: str, answer: str = "") -> tuple[int, str]:
    result = CliRunner().invoke(app, ["stores", *arguments], input=answer, standalone_mode=False)
    if isinstance(result.exception, UsageError):
        return result.exception.exit_code, str(result.exception)
    assert result.exception is None, result.exception
    return 0, result.output


def test_stores_are_listed_with_what_they_are_from(stores: list[Path], tmp_path: Path) -> None:
    os.utime(stores[0] / "source.json", (0, 0))
    found = json.loads(run("--json")[1])
    assert [(one["model"], one["bits"], one["state"]) for one in found] == [
        ("gone", "", "unfinished"),
        ("tiny", "16", "whole"),
        ("tiny", "16", "whole"),
    ]
    newer, older = (Path(one["path"]) for one in found[1:])
    assert [newer, older] == [stores[1], stores[0]]
    assert found[1]["checkpoint"] == str(tmp_path / "tiny")
    assert found[0]["bytes"] == 10
    assert found[2]["bytes"] == sum(file.stat().st_size for file in stores[0].iterdir())
    table = run()[1]
    assert "last used" in table
    assert all(str(one) in table.replace("\n", "") for one in stores)


def test_opening_a_store_is_its_last_use(stores: list[Path], tmp_path: Path) -> None:
    before = time.time()
    os.utime(stores[1] / "source.json", (0, 0))
    assert find_source(str(tmp_path / "tiny")).open_store().path == stores[1]
    assert shelf.find(stores[1].name).used >= before - 1


def test_one_is_removed_when_asked_for(stores: list[Path]) -> None:
    status, said = run("remove", stores[0].name, answer="n\n")
    assert (status, stores[0].name in said) == (2, True)
    assert stores[0].is_dir()
    assert run("remove", stores[0].name, answer="y\n")[0] == 0
    assert not stores[0].exists()
    assert stores[1].is_dir()
    assert run("remove", str(stores[1]), "--yes")[0] == 0
    assert run("remove", "gone", "--yes")[0] == 0
    assert [path for path in stores[0].parent.iterdir() if path.is_dir()] == []
    assert run("remove", "gone", "--yes")[0] == 2


def test_where_nobody_answers_it_stays(stores: list[Path]) -> None:
    status, said = run("remove", stores[0].name)
    assert (status, said) == (2, f"{stores[0].name} stays: nobody answered, and --yes does not ask")
    assert stores[0].is_dir()


def test_a_name_of_several_removes_none(stores: list[Path]) -> None:
    status, said = run("remove", "tiny", "--yes")
    assert (status, "there are 2 stores of tiny" in said) == (2, True)
    assert all(one.is_dir() for one in stores)


def test_what_is_in_use_stays(stores: list[Path]) -> None:
    with (stores[0] / "bundles.bin").open("rb"):
        status, said = run("remove", stores[0].name, "--yes")
        assert (status, said) == (2, f"{stores[0].name} is in use by process {os.getpid()}: it stays")
        assert stores[0].is_dir()
    with stores[0].with_name(stores[0].name + ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert "being written by a conversion" in run("remove", stores[0].name, "--yes")[1]
    assert run("remove", stores[0].name, "--yes")[0] == 0


def test_nothing_outside_is_removed(stores: list[Path], tmp_path: Path) -> None:
    (stores[0].parent / "linked").symlink_to(tmp_path / "tiny")
    for name in (str(tmp_path / "tiny"), "..", "", "linked", str(stores[0].parent)):
        assert run("remove", name, "--yes")[0] == 2
    assert (tmp_path / "tiny" / "config.json").is_file()


def test_without_stores_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASHRING_HOME", str(tmp_path / "nowhere"))
    assert run("--json") == (0, "[]\n")
    assert "no converted stores" in run()[1]
