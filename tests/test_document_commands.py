"""Every command in the documents is run where it says so, and read by its program's own parser elsewhere."""

from __future__ import annotations

import argparse
import os
import re
import runpy
import shlex
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from test_documents import DOCUMENTS, ROOT, name

from pipeline import cli
from pipeline.commands.programs import PROGRAMS

BLOCK = re.compile(r"((?:<!-- [^\n]* -->\n)?)```bash\n(.*?)^```$", re.MULTILINE | re.DOTALL)
WHOLE_PAGE = re.compile(r"<!-- no command on this page is run: .+ -->")
NOT_RUN = re.compile(r"<!-- not run: .+ -->\n")
NAMED = re.compile(r"<!-- (\w+ (?:command|example)) -->\n")
ENDS = re.compile(r"[;&|()<>]+")
PLACEHOLDER = re.compile(r"[A-Z_]+(?:\.\w+)?")  # such as STORE and FILE.gguf
ELSEWHERE = {
    "venv",
    "pytest",
    "workers.lab.evaluation.lm_eval_model",
}  # not ours, or in a package that tests lack
# Options of which a program says itself whether they are there.
INLINE = re.compile(r"`((?:python )?(?:run\.py|-m workers)[^`…]*)`")
Check = Callable[[list[str], bool], None]


def blocks(document: Path) -> list[tuple[str, str]]:
    """Each block of shell commands, with the comment right above it."""
    return [(mark, body) for mark, body in BLOCK.findall(document.read_text(encoding="utf-8"))]


def commands(body: str) -> Iterator[list[str]]:
    """The words of each command of a block that runs a program of ours, from `run.py` or `-m` on."""
    for line in re.sub(r"\\\n\s*", " ", body).splitlines():
        if "run.py" not in line and " -m " not in line and not line.startswith("flashring "):
            continue
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        words: list[str] = []
        for word in [*lexer, ";"]:
            if ENDS.fullmatch(word):
                yield from ours(words)
                words = []
            else:
                words.append(word)


def ours(words: list[str]) -> Iterator[list[str]]:
    for index, word in enumerate(words):
        if word == "run.py" or (word == "-m" and index + 1 < len(words)):
            yield words[index:]
            return
        if word == "flashring" and index == 0:
            yield ["run.py", *words[1:]]
            return


class Found(BaseException):
    """Carries a program's parser out of the program, before it does anything."""

    def __init__(self, parser: typer.Typer | argparse.ArgumentParser) -> None:
        self.parser = parser


class Programs:
    """The parsers of our programs, each imported once."""

    def __init__(self) -> None:
        self._found: dict[str, typer.Typer | argparse.ArgumentParser] = {}

    def check(self, words: list[str], *, whole: bool = True) -> None:
        """Raise what the program's own parser raises for these words. `whole`: also for what is missing."""
        if words[0] == "-m":
            if words[1] not in ELSEWHERE and words[1].startswith(("workers", "pipeline", "storage")):
                self._check(self.of(words[1]), words[2:], whole)
        else:
            self._check(cli.app, words[1:], whole)

    def of(self, module: str) -> typer.Typer | argparse.ArgumentParser:
        if module not in self._found:
            with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
                warnings.simplefilter("ignore", RuntimeWarning)  # some modules are imported already
                patch.setattr(typer.Typer, "__call__", _raise)
                patch.setattr(argparse.ArgumentParser, "parse_args", _raise)
                patch.setattr(sys, "argv", [module])
                with pytest.raises(Found) as found:
                    runpy.run_module(module, run_name="__main__", alter_sys=True)
            self._found[module] = found.value.parser
        return self._found[module]

    def _check(self, app: typer.Typer | argparse.ArgumentParser, words: list[str], whole: bool) -> None:
        if isinstance(app, argparse.ArgumentParser):
            for word in words:
                if word.startswith("--"):
                    assert word.partition("=")[0] in app._option_string_actions, f"no option {word}"
            return
        self._check_command(typer.main.get_command(app), words, whole)

    def _check_command(self, command: Any, words: list[str], whole: bool) -> None:
        context = command.context_class(command, info_name=command.name)
        context.allow_interspersed_args = not hasattr(command, "commands")
        values, rest, _ = command.make_parser(context).parse_args(list(words))
        for parameter in command.params:
            value = values.get(parameter.name)
            if value is None or type(value).__name__ == "Sentinel":
                assert not (whole and parameter.required), f"{parameter.name} is missing"
            elif not isinstance(value, (list, tuple, bool)):
                converted(parameter, value, context)
        if hasattr(command, "commands") and rest:
            assert rest[0] in command.commands, f"no command {rest[0]}"
            if rest[0] in PROGRAMS:
                self._check(self.of(PROGRAMS[rest[0]][0]), rest[1:], whole)
            else:
                self._check_command(command.commands[rest[0]], rest[1:], whole)
        else:
            assert rest == [], f"{rest} is too much"


def converted(parameter: Any, value: str, context: Any) -> None:
    """A value of the wrong type is refused; a placeholder, or a file that is not here, is not."""
    kind = parameter.get_runtime_param()
    if (
        not PLACEHOLDER.fullmatch(value)
        and not value.startswith("$")
        and parameter.type_descriptor.annotation is not Path
    ):
        kind.coerce(value, param=parameter, ctx=context)


def _raise(parser: typer.Typer | argparse.ArgumentParser, *_: object, **__: object) -> None:
    raise Found(parser)


@pytest.fixture(scope="module")
def programs() -> Programs:
    return Programs()


@pytest.mark.parametrize("document", [file for file in DOCUMENTS if blocks(file)], ids=name)
def test_commands_are_such_as_the_programs_take(document: Path, programs: Programs) -> None:
    for _, body in blocks(document):
        for words in commands(body):
            try:
                programs.check(words)
            except Exception as error:
                pytest.fail(f"{shlex.join(words)}: {error}")


@pytest.mark.parametrize("document", [file for file in DOCUMENTS if "docs" in file.parts], ids=name)
def test_commands_in_sentences_have_options_that_are_there(document: Path, programs: Programs) -> None:
    for text in INLINE.findall(document.read_text(encoding="utf-8")):
        words = next(ours(shlex.split(text.replace("|", " "))), None)
        if words is None or PLACEHOLDER.fullmatch(words[1] if len(words) > 1 else "X"):
            continue
        try:
            programs.check(words, whole=False)
        except Exception as error:
            if "requires an argument" not in str(error):  # a sentence may name an option alone
                pytest.fail(f"{text}: {error}")


@pytest.mark.parametrize("document", [file for file in DOCUMENTS if blocks(file)], ids=name)
def test_every_block_is_run_or_says_why_not(document: Path) -> None:
    """A named block is run by the test that has its name."""
    text = document.read_text(encoding="utf-8")
    tested = "\n".join(
        file.read_text(encoding="utf-8") for file in (*ROOT.glob("tests/*.py"), ROOT / ".ci/run")
    )
    for mark, body in blocks(document):
        named = NAMED.fullmatch(mark)
        says = mark == "<!-- run -->\n" or NOT_RUN.fullmatch(mark) or WHOLE_PAGE.search(text)
        assert says or (named and named[1] in tested) or (document.name == "README.md" and body == first()), (
            body
        )


def first() -> str:
    """The README's first command, which installs: `.ci/run` and a newcomer run it."""
    return blocks(ROOT / "README.md")[0][1]


@pytest.mark.ring
@pytest.mark.parametrize(
    "body",
    [body for document in DOCUMENTS for mark, body in blocks(document) if mark == "<!-- run -->\n"],
    ids=lambda body: body.split(" --")[0].replace("python ", "").strip(),
)
def test_marked_blocks_run(body: str, tmp_path: Path) -> None:
    (tmp_path / "run.py").symlink_to(ROOT / "run.py")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    (tmp_path / "bin" / "python").chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    ended = subprocess.run(
        ["bash", "-euc", body],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.strip()


@pytest.mark.parametrize(
    "line",
    [
        "python run.py --promt x",
        "python run.py verfy STORE",
        "python run.py verify",
        "python run.py --prompt x --seed one",
        "python run.py bench --tokens many",
        "python -m workers.lab.bench.reads FILE --depht 3",
    ],
)
def test_the_check_sees_what_is_wrong(line: str, programs: Programs) -> None:
    [words] = commands(line)
    with pytest.raises(Exception, match=r"(?i)no such|no command|missing|valid integer|no option"):
        programs.check(words)


def test_the_check_finds_the_commands() -> None:
    body = (
        'cat x | python run.py chat --model "a b" && \\\n  python3 -m workers.lab.bench.reads F # why\nls\n'
    )
    assert list(commands(body)) == [
        ["run.py", "chat", "--model", "a b"],
        ["-m", "workers.lab.bench.reads", "F"],
    ]
