"""The command line: mistakes are one sentence with an exit status, never a traceback."""

from __future__ import annotations

import importlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest
import typer
from checkpoints import write_checkpoint

from pipeline import cli, help
from pipeline.commands import generate
from pipeline.launch import PROGRAM

ROOT = Path(__file__).resolve().parent.parent
RUN = [sys.executable, str(ROOT / "run.py")]
Here = Callable[..., subprocess.CompletedProcess[str]]  # the fixture `here`


def run(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*RUN, *map(str, arguments)],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def refused(*arguments: str | Path, **environment: str) -> tuple[int, str]:
    """Exit status and sentence of a command that must print one line, on standard error only."""
    return refusal(run(*arguments, **environment))


def refusal(done: subprocess.CompletedProcess[str]) -> tuple[int, str]:
    """The same of a command that has run."""
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    *waits, sentence = done.stderr.splitlines()
    assert all(wait.endswith(("is starting", " so far")) for wait in waits)  # on a slow machine
    assert sentence.startswith("flashring: ")
    return done.returncode, sentence.removeprefix("flashring: ")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("cli") / "tiny", "opt", "float16")


@pytest.fixture(scope="module")
def store(checkpoint: Path) -> Path:
    out = checkpoint.with_name("store")
    done = run("convert", checkpoint, out)
    assert done.returncode == 0, done.stderr
    return out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "nothing to do: give --prompt"),
        (["--prompt"], "option '--prompt' requires an argument"),
        (["--prompt", ""], "the prompt is empty"),
        (["--prompt", "x", "--modle", "y"], "no such option: --modle"),
        (["--prompt", "x", "--context", "many"], "invalid value for '--context'"),
        (["--prompt", "x", "--model", "opt-6.8b"], "unknown model 'opt-6.8b'; did you mean opt-6.7b"),
        (["--prompt", "x", "--set", "cache.windw=3"], "did you mean cache.window?"),
        (["--prompt", "x", "--set", "cache"], "--set takes section.key=value"),
        (["--prompt", "x", "--config", "none.toml"], "none.toml cannot be read: No such file"),
        (["--prompt", "x", "--top-p", "3"], "sampling.top_p: Input should be less than or equal to 1"),
        (["--prompt", "x", "--max-new-tokens", "0"], "sampling.max_new_tokens: Input should be greater than"),
        (["--prompt", "x", "--force-tokens", "none.txt"], "none.txt cannot be read"),
        (
            ["--prompt", "x", "--max-new-tokens", "9" * 25],
            "sampling.max_new_tokens: Input should be less than",
        ),
        (
            ["--prompt", "x", "--set", "predictor.threshold=nan"],
            "predictor.threshold: Input should be a finite",
        ),
        (["frobnicate"], "no such command 'frobnicate'"),
        (["Once upon a time"], "a text goes behind --prompt"),
        (["convert"], "missing argument 'MODEL'; see "),
        (["--prompt", "x", "verify", "somewhere"], "--prompt does not go together with the command verify"),
    ],
)
def test_wrong_use_is_one_sentence_and_status_2(
    arguments: list[str],
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """In this process, because there are many; the tests below start processes of their own."""
    monkeypatch.setattr(sys, "argv", ["run.py", *arguments])
    status = cli.main()
    told = capsys.readouterr()
    assert (status, told.out) == (2, "")
    (sentence,) = told.err.splitlines()
    assert sentence.startswith("flashring: ")
    assert words in sentence


def test_wrong_use_ends_the_process_with_status_2() -> None:
    status, sentence = refused("--prompt", "x", "--model", "opt-6.8b")
    assert status == 2
    assert sentence.startswith("unknown model 'opt-6.8b'; did you mean opt-6.7b")


def test_what_is_missing_is_one_sentence_and_status_1() -> None:
    status, sentence = refused("--prompt", "x", "--model", "falcon-7b")
    assert status == 1
    assert "hf download tiiuae/falcon-7b" in sentence


def test_a_budget_that_is_too_small_names_the_least(store: Path, here: Here) -> None:
    status, sentence = refusal(here(cli.main, "--prompt", "x", "--model", store, "--memory", "1MiB"))
    assert status == 2
    assert "the least that would do is" in sentence


@pytest.mark.parametrize("memory", ["lots", "7 parsecs"])
def test_a_budget_that_is_none_is_refused(store: Path, memory: str, here: Here) -> None:
    status, sentence = refusal(here(cli.main, "--prompt", "x", "--model", store, "--memory", memory))
    assert (status, sentence) == (2, f"memory.budget takes a size such as 7GiB or 50%, not {memory!r}")


def test_a_damaged_store_is_refused(store: Path, tmp_path: Path, here: Here) -> None:
    damaged = tmp_path / "store"
    damaged.mkdir()
    for file in store.iterdir():
        (damaged / file.name).write_bytes(file.read_bytes()[: -1 if file.name == "bundles.bin" else None])
    status, sentence = refusal(here(cli.main, "--prompt", "x", "--model", damaged))
    assert status == 1
    assert "where its manifest says" in sentence


@pytest.mark.parametrize(
    ("file", "damage", "words"),
    [
        ("tokenizer.json", lambda data: b"?" + data[1:], "tokenizer.json does not match its hash"),
        pytest.param(
            "resident.safetensors",
            lambda data: data[:20] + b"?" * 20 + data[40:],
            "safetensors is damaged",
            marks=pytest.mark.ring,
        ),
        ("manifest.json", lambda data: _without(data, "bundles.bin"), "does not list bundles.bin"),
        ("manifest.json", lambda data: _without(data, "resident.safetensors"), "list resident.safetensors"),
        ("manifest.json", lambda data: _changed(data, files=[]), "manifest.json is damaged"),
        (
            "manifest.json",
            lambda data: _lacking(data, "layout"),
            "manifest.json is damaged: it lacks 'layout'",
        ),
        ("manifest.json", lambda data: _layers_changed(data, alignment=0), "an alignment of 0 bytes"),
        ("manifest.json", lambda data: _layers_changed(data, alignment="x"), "an alignment of 'x' bytes"),
    ],
)
def test_what_is_damaged_is_named(
    store: Path, tmp_path: Path, file: str, damage: Callable[[bytes], bytes], words: str, here: Here
) -> None:
    damaged = tmp_path / "store"
    shutil.copytree(store, damaged)
    (damaged / file).write_bytes(damage((store / file).read_bytes()))
    done = here(cli.main, "--prompt", "x", "--model", damaged)
    assert done.returncode == 1
    assert words in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


@pytest.mark.ring
def test_weights_that_are_no_numbers_end_the_answer(store: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "store"
    shutil.copytree(store, damaged)
    bundles = damaged / "bundles.bin"
    bundles.write_bytes(b"\xff" * bundles.stat().st_size)  # float16's NaN everywhere
    done = run("--prompt", "x", "--model", damaged, "--verify", "off", "--set", "predictor.kind=all")
    assert (done.returncode, done.stdout) == (1, "")
    assert "the logits are not finite: the weights are damaged" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("arguments", [["--help"], ["--prompt", "x", "--max-new-tokens", "3"]])
@pytest.mark.ring
def test_a_reader_that_has_left_is_status_141(store: Path, arguments: list[str]) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "wb") as pipe:
        command = [*RUN, "--model", store, *arguments]
        done = subprocess.run(command, stdout=pipe, stderr=subprocess.PIPE, check=False, timeout=120)
    assert done.returncode == 141
    assert b"Traceback" not in done.stderr
    assert b"flashring: " not in done.stderr  # nobody is there to read a sentence


def _layers_changed(data: bytes, **fields: object) -> bytes:
    return _changed(data, layout=[{**layer, **fields} for layer in json.loads(data)["layout"]])


def _changed(manifest: bytes, **entries: object) -> bytes:
    return json.dumps({**json.loads(manifest), **entries}).encode()


def _lacking(manifest: bytes, key: str) -> bytes:
    return json.dumps({name: value for name, value in json.loads(manifest).items() if name != key}).encode()


def _without(manifest: bytes, file: str) -> bytes:
    files = json.loads(manifest)["files"]
    del files[file]
    return _changed(manifest, files=files)


def test_help_is_no_mistake() -> None:
    done = run("--help")
    assert (done.returncode, done.stderr) == (0, "")
    for option in ("--prompt", "--model", "--memory", "--context", "--seed", "--config", "--set", "--json"):
        assert option in done.stdout
    for command in ("convert", "verify", "train-predictor"):
        assert command in done.stdout


def test_version_needs_no_prompt() -> None:
    done = run("--version")
    assert (done.returncode, done.stdout) == (0, f"flashring {version('flashring')}\n")


def test_what_http_lacks_is_said_before_the_model_is_looked_for(tmp_path: Path) -> None:
    (tmp_path / "prometheus_client.py").write_text("raise ImportError('no metrics here')")
    arguments = ("serve", "--http", "127.0.0.1:0", "--model", "none-such")
    status, sentence = refused(*arguments, PYTHONPATH=str(tmp_path))
    assert status == 2
    assert sentence.startswith("--http needs more packages: pip install ")
    assert sentence.endswith("(no metrics here)")


@pytest.mark.parametrize(
    ("command", "module"),
    [
        ("bench", "workers.lab.bench.__main__"),
        ("bench-serving", "workers.lab.bench.serving.__main__"),
        ("train-predictor", "workers.lab.training.__main__"),
        ("calibrate", "workers.lab.evaluation.curve.calibrate"),
        ("evaluate", "workers.lab.evaluation.__main__"),
        ("trace", "workers.lab.traces.__main__"),
        ("synthesize", "workers.lab.synthesis.__main__"),
    ],
)
def test_programs_of_their_own_show_help_like_all_commands(
    command: str, module: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [module, "--help"])
    monkeypatch.setenv(PROGRAM, f"run.py {command}")
    assert importlib.import_module(module).run() == 0
    assert PROGRAM not in os.environ  # not for what the program starts itself
    told = capsys.readouterr().out
    assert told.startswith(f"Usage: run.py {command} [OPTIONS]")
    assert "\n\n  " in told  # what it does
    assert "─" not in told  # no boxes: the same style as of the other commands


def test_a_program_of_its_own_is_told_what_the_user_called_it() -> None:
    status, sentence = refused("train-predictor", "--txt", "x")
    assert status == 2
    assert sentence.startswith("no such option: --txt ")
    assert sentence.endswith("; see run.py train-predictor --help")


def test_packages_in_the_callers_directory_do_not_matter(tmp_path: Path) -> None:
    for name in ("pipeline", "storage", "workers"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise SystemExit('not ours')")
    status, sentence = refused("--prompt", "", PYTHONPATH=str(tmp_path))
    assert (status, sentence) == (2, "the prompt is empty")


def test_the_console_script_refuses_another_projects_packages(tmp_path: Path) -> None:
    (tmp_path / "pipeline").mkdir()
    (tmp_path / "pipeline" / "__init__.py").write_text("")
    search = os.pathsep.join(map(str, (tmp_path, ROOT / "pipeline" / "launcher", ROOT)))
    done = subprocess.run(
        [sys.executable, "-P", "-c", "import sys, flashring; sys.exit(flashring.main())"],
        env=os.environ | {"PYTHONPATH": search},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert f"another project's package 'pipeline' at {tmp_path}" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.ring
def test_the_main_job_prints_a_text_or_one_object(store: Path) -> None:
    model = ("--model", store, "--set=cache.share=0.25")  # so that there is something to read
    arguments = (*model, "--prompt", "hello there", "--max-new-tokens", "8", "--ignore-eos")
    streamed = run(*arguments)
    assert streamed.returncode == 0, streamed.stderr
    assert "runs without predictors" in streamed.stderr.splitlines()[0]
    assert "8 tokens, " in streamed.stderr.splitlines()[-1]
    done = run(*arguments, "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert streamed.stdout == told["text"] + "\n"
    assert told["generated_tokens"] == 8
    assert told["prompt_tokens"] == 12  # one a byte, and the one that begins every text
    assert set(told["seconds"]) >= {"load", "prefill", "decode"}
    assert set(told["flash"]) >= {"bytes_read", "reads", "bytes_per_token"}
    assert set(told["cache"]) >= {"slots", "hits", "misses"}
    assert told["memory"]["budget_bytes"] is None
    assert told["memory"]["peak_bytes"] > 0
    assert [set(worker) >= {"name", "pid"} for worker in told["workers"]] == [True] * 4
    assert told["config"]["predictor"]["kind"] == "all"


@pytest.mark.parametrize("arguments", [["--prompt", "x", "--max-new-tokens", "2"], ["--help"]], ids=str)
@pytest.mark.ring
def test_output_that_nobody_can_take_is_one_sentence(store: Path, arguments: list[str]) -> None:
    line = [*RUN, "--model", str(store), *arguments]
    with open("/dev/full", "w") as full:
        done = subprocess.run(line, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == ("flashring: standard output: No space left on device")
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr


def test_what_cannot_be_said_ends_nothing() -> None:
    with open("/dev/full", "w") as full:
        line = [*RUN, "--prompt", "x", "--model", "opt-6.8b"]
        done = subprocess.run(line, stdout=subprocess.PIPE, stderr=full, check=False)
    assert (done.returncode, done.stdout) == (2, b"")


def test_an_over_long_prompt_is_refused(store: Path, here: Here) -> None:
    done = here(cli.main, "--prompt", "x" * 500, "--model", store)
    assert done.returncode == 2
    assert "see --context" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.ring
def test_forced_tokens_are_what_is_decoded(store: Path, tmp_path: Path) -> None:
    tokens = tmp_path / "tokens.txt"
    tokens.write_text("104 105 106\n")
    done = run("--prompt", "x", "--model", store, "--force-tokens", tokens, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["generated_tokens"] == 3


@pytest.mark.parametrize("tokens", ["0 1 99999999", "5 -5 7", f"1 {'9' * 25}"])
def test_forced_tokens_that_are_none_of_the_models_are_refused(
    store: Path, tmp_path: Path, tokens: str, here: Here
) -> None:
    file = tmp_path / "tokens.txt"
    file.write_text(tokens)
    status, sentence = refusal(here(cli.main, "--prompt", "x", "--model", store, "--force-tokens", file))
    assert status == 2
    assert sentence.startswith("the tokens to decode hold token id ")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.ring
def test_an_interrupted_generation_ends_in_one_sentence(store: Path, number: signal.Signals) -> None:
    arguments = ("--prompt", "x", "--model", store, "--max-new-tokens", "120", "--ignore-eos")
    with subprocess.Popen(
        [*RUN, *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        process.stdout.read(1)  # it is in the middle of its text
        process.send_signal(number)
        _, told = process.communicate(timeout=60)
    assert "Traceback" not in told
    # A generation this short may be over before the signal arrives; then it ends as if there were none.
    assert process.returncode in (0, 130)
    assert told.splitlines()[-1] == "flashring: interrupted" or process.returncode == 0


def test_a_prompt_that_is_no_utf_8_is_refused(store: Path) -> None:
    done = subprocess.run(
        [*RUN, "--model", str(store), "--prompt", b"\xff\xfe"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == "flashring: the prompt is not valid UTF-8"


@pytest.mark.ring
def test_a_terminal_that_cannot_show_a_character_gets_an_escape(store: Path) -> None:
    line = ["--model", store, "--prompt", "x", "--max-new-tokens", "30", "--ignore-eos"]
    done = run(*line, PYTHONIOENCODING="ascii")
    assert done.returncode == 0, done.stderr
    assert done.stdout.isascii()


@pytest.mark.ring
def test_a_long_temporary_directory_is_no_obstacle(store: Path, tmp_path: Path) -> None:
    deep = tmp_path / ("x" * 100)
    deep.mkdir()
    done = run("--model", store, "--prompt", "x", "--max-new-tokens", "2", TMPDIR=str(deep))
    assert done.returncode == 0, done.stderr


def test_a_manifest_that_is_no_object_is_refused(store: Path, tmp_path: Path, here: Here) -> None:
    (tmp_path / "manifest.json").write_text("[1]")
    status, sentence = refusal(here(cli.main, "--prompt", "x", "--model", tmp_path))
    assert (status, sentence) == (1, f"{tmp_path / 'manifest.json'} is not a flashring store manifest")


@pytest.mark.ring
def test_a_policy_that_nobody_knows_is_a_mistake_of_use(store: Path) -> None:
    """Only the cache knows which there are."""
    done = run("--model", store, "--prompt", "a", "--set", "cache.policy=nope")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines()[-1] == "flashring: cache.policy is one of lrfu, lru, not 'nope'"
    assert "Traceback" not in done.stderr


def test_every_command_is_listed_with_a_whole_sentence() -> None:
    shown = run("--help").stdout.split("Commands:")[1]
    assert "..." not in shown
    names = re.findall(r"^  ([a-z][\w-]+) ", shown, re.MULTILINE)
    assert names == list(typer.main.get_command(cli.app).commands)  # type: ignore[attr-defined]
    assert shown.count(".\n") == len(names)


@pytest.mark.parametrize(
    ("made", "shown"),
    [
        (("--a <int>", "Some.  [default: 0; x>=0]"), ("--a N", "Some.  [default: 0]")),
        (("--a <int range>", "Some.  [x>=0]"), ("--a N", "Some.")),
        (("--a <float range>", "Some.  [1<=x<=8]"), ("--a F", "Some.  [1 to 8]")),
        (("--a <float>", "Some. [default: 3]  [x>=2]"), ("--a F", "Some. [default: 3; at least 2]")),
        (("--a FILE", "Some.  [required; x<=0.5]"), ("--a FILE", "Some.  [required; at most 0.5]")),
        (("--a <list[str]>", "Some."), ("--a TEXT", "Some.")),
    ],
)
def test_help_has_words_for_types_and_ranges(made: tuple[str, str], shown: tuple[str, str]) -> None:
    assert help.option(*made) == shown


@pytest.mark.parametrize(
    ("said", "expected"), [("a bear\n", "a bear"), ("two\nlines\n\n", "two\nlines\n"), ("", "")]
)
def test_the_prompt_may_come_from_standard_input(
    said: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(said))
    assert generate._from_standard_input() == expected
