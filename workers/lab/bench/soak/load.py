"""`python -m workers.lab.bench.soak.load --clients 200`: everybody asks at once, on a queue that holds fewer.

Each client asks one question; who is refused because the queue is full asks again until it is answered.
Prints one JSON object: refusals, wrong answers, and how long clients waited for their first piece.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from pipeline import ending
from pipeline.errors import QueueFull
from pipeline.serving.client import Client
from storage.errors import FlashringError
from workers.lab.bench.soak.clients import Question, answers, pool, quantiles
from workers.lab.bench.soak.running import Running, running

PATIENCE = 1800.0  # seconds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", default="", help="a model as of run.py; without: the built-in one")
    parser.add_argument("--clients", type=int, default=200, help="that ask at once")
    parser.add_argument("--queue", type=int, default=64, help="requests that may wait")
    parser.add_argument("--tokens", type=int, default=16, help="of one answer")
    given = parser.parse_args()
    line = [
        "--context",
        "256",
        "--queue",
        str(given.queue),
        *(["--model", given.model] if given.model else []),
    ]
    with tempfile.TemporaryDirectory(prefix="load-") as name, running(Path(name), line) as server:
        result = measure(server, given.clients, given.tokens)
    print(json.dumps(result, indent=2))
    if result["wrong"]:
        raise FlashringError(f"{result['wrong']} answers were not what a lone client gets")
    return 0


def measure(server: Running, clients: int, tokens: int) -> dict[str, Any]:
    """Ask `clients` questions at once."""
    questions = [Question(one.prompt, tokens, one.seed, one.temperature) for one in pool(1)]
    right = answers(server, questions)
    start, ends, waits = threading.Barrier(clients, timeout=PATIENCE), Counter[str](), list[float]()

    def ask(number: int) -> None:
        question, draw = questions[number % len(questions)], random.Random(number)
        with Client(server.endpoint, timeout=PATIENCE) as client:
            client.health()  # connected, before anybody asks
            start.wait()
            begun = time.monotonic()
            while True:
                try:
                    text = ""
                    for piece in client.generate(question.prompt, **question.options()):
                        if not text:
                            waits.append(time.monotonic() - begun)
                        text += piece
                    break
                except QueueFull:
                    ends["refused"] += 1
                    time.sleep(0.5 + draw.random())
        ends["right" if text == right[question] else "wrong"] += 1

    with ThreadPoolExecutor(clients) as threads:
        list(threads.map(ask, range(clients)))
    return {
        "clients": clients,
        "right": ends["right"],
        "wrong": ends["wrong"],
        "refusals": ends["refused"],
        "waiting_seconds": quantiles(waits),
    }


if __name__ == "__main__":
    sys.exit(ending.exit_status(main))
