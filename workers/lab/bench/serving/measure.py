"""What serving costs a token, and whether concurrent clients get lone runs' texts."""

from __future__ import annotations

import contextlib
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import perf_counter
from typing import Any

from pipeline.console import say
from pipeline.launch import ROOT, module_environment
from pipeline.ring.generation import GenerationParams
from pipeline.ring.sampling import Sampling
from pipeline.ring.session import Session
from pipeline.serving.client import Client
from pipeline.serving.opening import open_ring
from storage.errors import FlashringError

PROMPT = "Once upon a time"
READY_SECONDS = 300.0  # loading included


def measure(
    model: str, memory: str, settings: Sequence[str], *, tokens: int, rounds: int, clients: int, requests: int
) -> dict[str, Any]:
    """Time `rounds` answers of `tokens` tokens each way, in turns; compare concurrent texts too."""
    arguments = ["--model", model] * bool(model) + ["--memory", memory] * bool(memory)
    arguments += [f"--set={setting}" for setting in settings]
    lone: list[float] = []
    served: list[float] = []
    params = GenerationParams(max_new_tokens=tokens, ignore_eos=True)
    opened = open_ring(model, memory, settings=settings)
    session = opened.ring.session
    assert isinstance(session, Session)
    with (
        contextlib.closing(opened.ring),
        tempfile.TemporaryDirectory() as directory,
        _server(Path(directory), arguments) as endpoint,
        Client(endpoint, timeout=60) as client,
    ):
        for _ in range(rounds + 1):  # the first of each warms up; the two kinds take turns
            lone.append(_lone(session, params))
            served.append(_served(client, params))
        texts = _concurrent_texts(endpoint, clients, requests)
        alone = [
            ["".join(session.generate(PROMPT, _sampled(number, turn))) for turn in range(requests)]
            for number in range(clients)
        ]
    without, through = statistics.median(lone[1:]) * 1e3, statistics.median(served[1:]) * 1e3
    return {
        "tokens": tokens,
        "rounds": rounds,
        "lone_ms_per_token": [round(one * 1e3, 4) for one in lone[1:]],
        "served_ms_per_token": [round(one * 1e3, 4) for one in served[1:]],
        "median_lone_ms": round(without, 4),
        "median_served_ms": round(through, 4),
        "cost_ms": round(through - without, 4),
        "concurrent": {"clients": clients, "requests": requests, "equal": texts == alone},
    }


def _sampled(client: int, turn: int) -> GenerationParams:
    return GenerationParams(16, Sampling(1.0, 50, 0.95, seed=1000 * client + turn), ignore_eos=True)


def _seconds_per_token(moments: Sequence[float]) -> float:
    """From one token's arrival to the next, on average: without the prefill."""
    return (moments[-1] - moments[0]) / (len(moments) - 1)


def _lone(session: Session, params: GenerationParams) -> float:
    for _ in session.generate(PROMPT, params):
        pass
    assert session.last is not None
    return _seconds_per_token(session.last.moments)


def _served(client: Client, params: GenerationParams) -> float:
    answer = client.generate(
        PROMPT,
        max_new_tokens=params.max_new_tokens,
        temperature=params.sampling.temperature,
        top_k=params.sampling.top_k,
        top_p=params.sampling.top_p,
        ignore_eos=params.ignore_eos,
    )
    answer.read()
    return _seconds_per_token(answer.moments)


def _concurrent_texts(endpoint: str, clients: int, requests: int) -> list[list[str]]:
    def talk(number: int) -> list[str]:
        with Client(endpoint, timeout=600) as client:
            return [
                client.generate(
                    PROMPT,
                    max_new_tokens=16,
                    temperature=1.0,
                    top_k=50,
                    top_p=0.95,
                    seed=1000 * number + turn,
                    ignore_eos=True,
                ).read()
                for turn in range(requests)
            ]

    with ThreadPoolExecutor(clients) as pool:
        return list(pool.map(talk, range(clients)))


@contextlib.contextmanager
def _server(directory: Path, arguments: list[str]) -> Iterator[str]:
    """`serve` in a process of its own; yields its endpoint."""
    endpoint = f"ipc://{directory / 'ring.sock'}"
    line = [sys.executable, str(ROOT / "run.py"), "serve", "--endpoint", endpoint, *arguments]
    with subprocess.Popen(line, env=module_environment()) as process:
        try:
            _wait_until_ready(endpoint, process)
            yield endpoint
        finally:
            process.send_signal(signal.SIGTERM)


def _wait_until_ready(endpoint: str, process: subprocess.Popen[bytes]) -> None:
    deadline = perf_counter() + READY_SECONDS
    while True:
        with contextlib.suppress(FlashringError), Client(endpoint, timeout=1.0):
            return
        if process.poll() is not None or perf_counter() > deadline:
            raise FlashringError("the server did not start")
        say("waiting for the server")
