"""Rings behind Ray, on a local Ray: a file of prompts by Ray Data, and OpenAI's API by Ray Serve."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline import Pipeline
from pipeline.planner.budget import parse_size
from storage.errors import ConfigError, UsageError
from workers.lab.cluster.prompts import read
from workers.lab.cluster.ring import RingOptions

ROOT = Path(__file__).resolve().parent.parent
SMALL = ["--memory", "600MiB", "--cpus", "0.1"]
PROMPTS = [
    {"prompt": "Once upon a time", "name": "first"},
    {"prompt": "The bear", "seed": 3, "name": "second"},
    {"prompt": "Once upon a time", "seed": 0, "name": "third"},
]


def start(*arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.fixture(scope="module")
def texts() -> Iterator[list[str]]:
    """What one ring writes to each prompt."""
    pytest.importorskip("ray")
    with Pipeline.open(memory="600MiB") as pipeline:
        yield [
            "".join(pipeline.generate(str(row["prompt"]), max_new_tokens=12, seed=int(row.get("seed", 0))))
            for row in PROMPTS
        ]


@pytest.mark.ring
def test_a_file_of_prompts_through_two_rings(texts: list[str], tmp_path: Path) -> None:
    prompts, answers = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    prompts.write_text("".join(json.dumps(row) + "\n" for row in PROMPTS))
    options = ["--rings", 2, "--max-new-tokens", 12, *SMALL]
    with start("workers.lab.cluster.prompts", prompts, answers, *options) as process:
        _, told = process.communicate(timeout=250)
    assert process.returncode == 0, told
    rows = [json.loads(line) for line in answers.read_text().splitlines()]
    assert rows == [{**row, "text": text} for row, text in zip(PROMPTS, texts, strict=True)]


@pytest.mark.ring
def test_openais_api_from_a_replica(texts: list[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as found:
        port = found.getsockname()[1]
    address = f"127.0.0.1:{port}"
    with start("workers.lab.cluster.serve", "--replicas", 1, "--http", address, *SMALL) as process:
        try:
            assert process.stderr is not None
            lines = [process.stderr.readline()]
            while lines[-1] and address not in lines[-1]:
                lines.append(process.stderr.readline())
            assert lines[-1], "".join(lines)
            body = {"prompt": "Once upon a time", "max_tokens": 12, "seed": 0}
            answer = post(f"http://{address}/v1/completions", body)
            assert answer["choices"][0]["text"] == texts[0]
        finally:
            process.send_signal(signal.SIGTERM)
            process.communicate(timeout=60)


def post(url: str, body: dict[str, Any]) -> Any:
    request = urllib.request.Request(
        url, json.dumps(body).encode(), {"Content-Type": "application/json"}, method="POST"
    )
    with urllib.request.urlopen(request, timeout=100) as response:
        return json.loads(response.read())


def test_a_ring_asks_ray_for_its_budget() -> None:
    assert RingOptions("", "2GiB", 0, ()).resources(1.5) == {"num_cpus": 1.5, "memory": 2 << 30}
    assert RingOptions("", "50%", 0, ()).resources(1) == {"num_cpus": 1}
    assert RingOptions("", "", 0, ()).resources(1) == {"num_cpus": 1}
    with pytest.raises(ConfigError, match="--memory takes a size"):
        RingOptions("", "much", 0, ()).resources(1)


def test_a_percentage_is_of_the_whole() -> None:
    assert parse_size("50%+1KiB", "it", lambda: 4096) == 3072


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("no", "line 2 of .* is no JSON"),
        ("[]", 'line 2 of .* has no text "prompt"'),
        ('{"prompt": 3}', 'line 2 of .* has no text "prompt"'),
        ('{"prompt": "x", "seed": 0.5}', 'the "seed" in line 2 of .* is no whole number'),
    ],
)
def test_lines_that_are_no_prompts(line: str, words: str, tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text(json.dumps(PROMPTS[0]) + "\n" + line + "\n")
    with pytest.raises(UsageError, match=words):
        read(file)
