"""The examples of docs/serving.md, run as they are printed, on the built-in model."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.ring

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")


def snippet(name: str, page: str = PAGE) -> str:
    """The code block below the comment of that name."""
    found = re.search(rf"<!-- {name} -->\n```\w+\n(.*?)```", page, re.DOTALL)
    assert found is not None, name
    return found.group(1)


def run(command: list[str], cwd: Path = ROOT) -> str:
    """Standard output of a program that ends well."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    ended = subprocess.run(
        command, capture_output=True, text=True, timeout=200, check=False, cwd=cwd, env=environment
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What the in-process example writes."""
    return run([sys.executable, "-c", snippet("in-process example")], tmp_path_factory.mktemp("elsewhere"))


@pytest.fixture(scope="module")
def server(text):
    """The server of the example; the store is there already, from the in-process example."""
    words = snippet("serve command").split()
    assert words[0] == "python"
    with subprocess.Popen(
        [sys.executable, *words[1:]], cwd=ROOT, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        try:
            lines = [process.stderr.readline()]
            while lines[-1] and "http://127.0.0.1:8080" not in lines[-1]:
                lines.append(process.stderr.readline())
            assert lines[-1], "".join(lines)
            yield process
        finally:
            process.send_signal(signal.SIGTERM)
            process.communicate(timeout=60)


def test_in_process_example_is_as_a_script_without_a_guard(text, tmp_path):
    assert len(text.split()) > 10
    script = tmp_path / "story.py"
    script.write_text(snippet("in-process example"))
    assert run([sys.executable, str(script)], tmp_path) == text


@pytest.mark.usefixtures("server")
def test_client_example(text, tmp_path):
    assert run([sys.executable, "-c", snippet("client example")], tmp_path) == text


@pytest.mark.usefixtures("server")
def test_openais_own_client(text, tmp_path):
    page = (ROOT / "docs" / "clients.md").read_text(encoding="utf-8")
    assert run([sys.executable, "-c", snippet("openai example", page)], tmp_path) + "\n" in (
        text,
        text + "\n",
    )


@pytest.mark.usefixtures("server")
def test_curl_example(text, tmp_path):
    answer = json.loads(run(["bash", "-c", snippet("curl example")], tmp_path))
    assert answer["choices"][0]["text"] == text
    assert answer["usage"]["completion_tokens"] <= 50


@pytest.mark.usefixtures("server")
def test_the_protocols_example_client(text, tmp_path):
    protocol = (ROOT / "pipeline" / "PROTOCOL.md").read_text(encoding="utf-8")
    found = re.search(r"## A client in fifteen lines\n\n```python\n(.*?)```", protocol, re.DOTALL)
    assert found is not None
    assert run([sys.executable, "-c", found.group(1)], tmp_path) == text


@pytest.mark.usefixtures("server")
def test_schema_example(tmp_path):
    answer = json.loads(run(["bash", "-c", snippet("schema example")], tmp_path))
    bear = json.loads(answer["choices"][0]["text"])
    assert bear.keys() == {"name", "size"}
    assert bear["size"] in ("big", "small")
    assert answer["choices"][0]["finish_reason"] == "stop"
