"""README, container and site: what stands in one place agrees with what stands in the other."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from test_document_commands import blocks
from test_documents import ROOT

from pipeline.program import make
from workers.lab.documents.__main__ import pages
from workers.lab.documents.configuration import comments

CONTAINER = (ROOT / "Containerfile").read_text(encoding="utf-8")


def test_the_readme_is_a_page() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 120


@pytest.mark.parametrize("page", pages().items(), ids=lambda page: page[0].name)
def test_made_pages_are_up_to_date(page: tuple[Path, str]) -> None:
    file, text = page
    assert file.read_text(encoding="utf-8") == text, "run python -m workers.lab.documents"


def test_every_key_has_a_meaning() -> None:
    source = (ROOT / "pipeline" / "config.py").read_text(encoding="utf-8")
    sections = {name: said for name, said in comments(source).items() if name[0] != "Config"}
    assert [".".join(name) for name, said in sections.items() if not said] == []


def test_comments_above_and_beside_a_key_are_its_meaning() -> None:
    source = "class A:\n    # one\n    # two\n    b: int = (\n        3\n    )  # three\n\n"
    source += "    # of none\n\n    c: int = 1\n"
    assert comments(source) == {("A", "b"): "one two three", ("A", "c"): ""}


def stage(name: str) -> tuple[str, list[str]]:
    """What one stage of the container runs when it is made, and what when it is started."""
    found = re.search(rf"^FROM source{name}\n(.*?)(?=^FROM|\Z)", CONTAINER, re.MULTILINE | re.DOTALL)
    assert found is not None
    run = re.findall(r"^RUN (.*)$", found[1], re.MULTILINE)
    started = re.findall(r"^(?:ENTRYPOINT|CMD) (.*)$", found[1], re.MULTILINE)
    return " && ".join(run), [word for line in started for word in json.loads(line)]


@pytest.mark.parametrize(("name", "block"), [("", 0), (" AS tests", 1)])
def test_the_container_runs_the_readmes_commands(name: str, block: int) -> None:
    run, started = stage(name)
    command = shlex.split(blocks(ROOT / "README.md")[block][1])
    assert [*shlex.split(run), "&&", *started] == command


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    built = subprocess.run(
        [
            sys.executable,
            "-m",
            "mkdocs",
            "build",
            "--strict",
            "--quiet",
            "--site-dir",
            str(tmp_path / "site"),
        ],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (built.returncode, built.stdout, built.stderr) == (0, "", "")
    page = (tmp_path / "site" / "use" / "index.html").read_text(encoding="utf-8")
    assert 'href="../serving/"' in page


def test_every_page_stands_in_the_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    missing = [file.name for file in ROOT.glob("docs/*.md") if f": {file.name}\n" not in navigation]
    assert missing == []


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_shells_completion_is_a_script(shell: str) -> None:
    """And it asks the program by the variable that the program listens to."""
    asked = {"_FLASHRING_COMPLETE": f"source_{shell}"}
    code = "import sys; from pipeline.cli import app; sys.argv[0] = 'flashring'; app(prog_name='flashring')"
    told = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=os.environ | asked,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "_FLASHRING_COMPLETE" in told.stdout
    assert "flashring" in told.stdout


def test_completion_names_commands() -> None:
    asked = {"_FLASHRING_COMPLETE": "complete_bash", "COMP_WORDS": "flashring ver", "COMP_CWORD": "1"}
    code = "from pipeline.cli import app; app(prog_name='flashring')"
    told = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=os.environ | asked,
        capture_output=True,
        text=True,
        check=True,
    )
    assert told.stdout.split() == ["verify"]


def test_programs_of_their_own_have_no_completion() -> None:
    assert make()._add_completion is False
