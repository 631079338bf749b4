"""`run.py plan`: what it promises follows from sizes and kept rates, and it fetches and converts nothing."""

from __future__ import annotations

import json
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import machine
import pytest
from checkpoints import write_checkpoint
from typer.testing import CliRunner

from pipeline import console, status
from pipeline.cli import app
from pipeline.commands.plan import rate
from pipeline.models.names import configure
from pipeline.models.published import PUBLISHED
from pipeline.planner import rates
from pipeline.planner.survey import subject, with_memory
from storage.errors import FlashringError
from workers.probe import others


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A private one, in which this machine is measured already."""
    found = tmp_path / "home"
    monkeypatch.setenv("FLASHRING_HOME", str(found))
    machine.keep(found)
    return found


def run(*arguments: str | Path) -> str:
    result = CliRunner().invoke(app, ["plan", *map(str, arguments)], standalone_mode=False)
    if result.exception is not None:
        raise result.exception
    return result.stdout


def plan(*arguments: str | Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(run(*arguments, "--json"))
    return found


def test_every_preset_that_fits_is_told_and_every_other_is_named(home: Path) -> None:
    found = plan("--memory", "6GiB")
    fits = {(one["model"], one["bits"]) for one in found["models"]}
    assert ("opt-6.7b", 16) not in fits
    assert "opt-6.7b in 16 bits" in found["left_out"]
    assert {("opt-6.7b", 4), ("qwen3-8b", 4), ("opt-1.3b", 16), ("builtin", 16)} <= fits
    assert len(fits) + len(found["left_out"]) == 3 * (len(PUBLISHED) + 1) + 1  # the mixture has its own bits
    assert all(one["memory_bytes"] <= 6 << 30 for one in found["models"])
    assert not (home / "stores").exists()


def test_the_probe_is_not_silent_and_tells_of_programs_that_disturbed_it(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = json.loads((home / "machine.json").read_text(encoding="utf-8"))
    waited = threading.Event()

    def probe(others: float) -> Callable[..., subprocess.CompletedProcess[str]]:
        disk = next(iter(kept["disks"].values()))
        said = json.dumps({**kept["memory"], "kinds": kept["kernels"], "disk": disk, "others": others})

        def ask(*_: object, **__: object) -> subprocess.CompletedProcess[str]:
            waited.wait(0.5)
            return subprocess.CompletedProcess([], 0, said, "")

        return ask

    monkeypatch.setattr(status, "LINE_SECONDS", 0.05)
    monkeypatch.setattr(status, "TICK_SECONDS", 0.01)
    monkeypatch.setattr(rates, "ask_module", probe(0.01))
    rates.measured(renew=True, say=console.say)
    said = capsys.readouterr().err
    assert "measuring this machine: 0 s so far" in said
    assert "other programs" not in said
    monkeypatch.setattr(rates, "ask_module", probe(0.4))
    rates.measured(renew=True, say=console.say)
    rates.measured(say=console.say)  # kept, and still told
    assert capsys.readouterr().err.count("other programs took 40% of the processors") == 2


def test_what_others_took_is_neither_idle_nor_ours() -> None:
    before, after = others.Moment(all=100, idle=40, own=5), others.Moment(all=120, idle=46, own=9)
    assert others.share(before, after) == pytest.approx((20 - 6 - 4) / 20)
    assert others.share(after, after) == 0
    now = others.Moment.now()
    assert now.all > now.idle > 0
    assert now.own > 0


def test_more_memory_reads_less_and_is_quicker() -> None:
    small, large = (plan("--model", "qwen3-8b", "--bits", "4", "--memory", size) for size in ("5GiB", "6GiB"))
    assert small["bytes_per_token"] > large["bytes_per_token"] > 0
    assert small["seconds_per_token"] > large["seconds_per_token"]


def test_a_models_parts_add_up_and_its_range_is_in_order() -> None:
    found = plan("--model", "opt-6.7b", "--memory", "8GiB")
    parts = {name: taken for name, taken in found["seconds"].items() if name != "reading"}
    assert sum(parts.values()) == pytest.approx(found["seconds_per_token"])
    least, most = found["least"]["memory_bytes"], found["most"]["memory_bytes"]
    assert least <= found["enough_bytes"] <= most
    assert "train-predictor" in found["assumed"]
    assert [point["memory_bytes"] for point in found["curve"]] == sorted(
        point["memory_bytes"] for point in found["curve"]
    )


def test_the_least_that_works_is_what_a_smaller_budget_is_refused_with() -> None:
    least = plan("--model", "qwen3-0.6b")["least"]["memory_bytes"]
    assert plan("--model", "qwen3-0.6b", "--memory", f"{least}B")["memory_bytes"] == least
    with pytest.raises(FlashringError, match=r"too small for qwen3-0\.6b"):
        run("--model", "qwen3-0.6b", "--memory", f"{least - 1}B")


def test_a_checkpoint_is_planned_as_its_store_is(tmp_path: Path, home: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "tiny", "llama", "float16")
    before = plan("--model", checkpoint, "--bits", "8")
    assert not (home / "stores").exists()
    assert not subject(str(checkpoint), values={"model": {"bits": 8}}).made
    source, _ = configure(str(checkpoint), None, [], {"model": {"bits": 8}})
    source.open_store()
    after = plan("--model", checkpoint, "--bits", "8")
    for one, made in ((before, False), (after, True)):
        assert [part.pop("converted") for part in (one, one["least"], one["most"])] == [made] * 3
    assert before == after


@pytest.mark.parametrize(
    ("tokens", "told"), [(0.0312, "0.031"), (4.56, "4.6"), (45.2, "45"), (99.7, "100"), (1234.5, "1,234")]
)
def test_a_rate_is_told_without_an_exponent(tokens: float, told: str) -> None:
    assert rate(tokens) == told


def test_tables_name_every_source_of_time() -> None:
    shown = run("--model", "opt-1.3b", "--memory", "3GiB")
    for words in ("waiting for the disk", "layers' own price", "together", "smallest memory that works"):
        assert words in shown
    assert "opt-125m" in run("--memory", "2GiB")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--bits", "4"], "about one model"),
        (["--model", "opt-6.8b"], "did you mean opt-6.7b"),
        (["--model", "opt-1.3b", "--memory", "much"], "takes a size such as 7GiB"),
        (["--memory", "much"], "takes a size such as 7GiB"),
    ],
)
def test_wrong_use_is_one_sentence(arguments: list[str], words: str) -> None:
    with pytest.raises(FlashringError, match=words) as caught:
        run(*arguments)
    assert caught.value.exit_code == 2


def test_another_processors_rates_do_not_count(home: Path) -> None:
    assert rates.known(home) is not None
    kept = json.loads((home / "machine.json").read_text())
    kept["machine"]["processor"] = "another"
    (home / "machine.json").write_text(json.dumps(kept))
    assert rates.known(home) is None
    (home / "machine.json").write_text("{")
    assert rates.known(home) is None


def test_a_budget_replaces_what_was_said_of_slots() -> None:
    one = with_memory(subject("opt-30b"), "20GiB")  # its preset keeps a share
    assert one.resolved.config.memory.budget == "20GiB"
    assert one.resolved.config.cache.share is None
