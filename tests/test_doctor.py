"""`run.py doctor`: every lack has its consequence and its remedy, and reports show no private path."""

from __future__ import annotations

import json
from pathlib import Path

import machine
import pytest
from typer.testing import CliRunner

from pipeline.cli import app
from pipeline.commands.doctor import plain, shortened
from pipeline.doctor import abilities, system
from pipeline.doctor.finding import Finding
from storage.errors import UsageError

SAID = {
    "io_uring": "",
    "registered": "",
    "registered_bytes": 64 << 20,
    "direct": "direct I/O",
    "alignment": 512,
    "features": ["AVX2"],
    "machine": "x86_64",
    "compiled": "",
    "kernels": "numba 1, omp threads",
}


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("FLASHRING_HOME", str(tmp_path / "cache"))
    machine.keep(tmp_path / "cache")
    return tmp_path


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["doctor", *arguments])
    return result.exit_code, result.stdout


def test_all_is_looked_at_on_this_machine(home: Path) -> None:
    status, shown = run("--json")
    said = json.loads(shown)
    assert (status, said["runs"]) == (0, True)
    names = [one["name"] for one in said["findings"]]
    assert len(names) == len(set(names))
    for name in (
        "io_uring",
        "direct I/O",
        "instructions",
        "locked memory",
        "shared memory",
        "stores",
        "disk",
    ):
        assert name in names
    for one in said["findings"]:
        assert one["found"]
        assert one["state"] == "fine" or one["state"] == "told" or (one["consequence"] and one["remedy"])


def test_a_report_names_no_home(home: Path) -> None:
    status, shown = run("--report")
    assert status == 0
    assert str(home) not in shown
    assert "~/cache" in shown
    assert "\x1b" not in shown


def test_what_does_not_run_is_a_failure(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(abilities, "ask", lambda _: {"failed": "no module named numba"})
    status, shown = run("--json")
    assert status == 1
    assert not json.loads(shown)["runs"]


def test_two_forms_at_once_are_refused(home: Path) -> None:
    result = CliRunner().invoke(app, ["doctor", "--report", "--json"], standalone_mode=False)
    assert isinstance(result.exception, UsageError)


@pytest.mark.parametrize(
    ("changed", "name", "state"),
    [
        ({}, "io_uring", "fine"),
        ({"io_uring": "the kernel forbids it"}, "io_uring", "less"),
        ({"io_uring": "the kernel forbids it"}, "registered buffers", "told"),
        ({"registered": "Cannot allocate memory"}, "registered buffers", "less"),
        ({"direct": "through the page cache, because …"}, "direct I/O", "less"),
        ({"features": []}, "instructions", "less"),
        ({"features": ["NEON"], "machine": "aarch64"}, "instructions", "fine"),
        ({"compiled": "they do not compile"}, "kernels", "broken"),
    ],
)
def test_what_workers_find_is_told(changed: dict[str, object], name: str, state: str) -> None:
    found = {one.name: one for one in abilities.findings({**SAID, **changed})}
    assert found[name].state == state
    if state in ("less", "broken"):
        assert found[name].consequence.endswith(".")
        assert found[name].remedy.endswith(".")


@pytest.mark.parametrize(
    ("words", "states"),
    [
        ("always within_size [advise] never deny force\n", ["fine"]),
        ("always within_size advise [never] deny force\n", ["less"]),
        (None, []),
    ],
)
def test_large_pages_of_shared_memory_are_told(
    words: str | None, states: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "shmem_enabled"
    if words is not None:
        file.write_text(words, encoding="ascii")
    monkeypatch.setattr(system, "LARGE_PAGES", file)
    found = [one for one in system.findings() if one.name == "large pages"]
    assert [one.state for one in found] == states


def test_a_home_that_cannot_be_written_is_broken(monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    monkeypatch.setattr(system.os, "access", lambda path, mode: False)
    found = {one.name: one for one in system.places(measure=False)}
    assert found["stores"].state == "broken"


def test_plain_text_has_consequence_and_remedy_below_what_was_found() -> None:
    found = [Finding("a", "less", "b", "It is slow.", "Do this."), Finding("c", "fine", "d")]
    assert plain(found) == "less    a: b\n        It is slow.\n        Do this.\nok      c: d\n"
    assert shortened(f"{Path.home()}/x") == "~/x"
