"""The long run itself: `python -m workers.lab.bench.soak --minutes 30`."""

from __future__ import annotations

import json
import random
import sys
import tempfile
import threading
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from pipeline import program
from pipeline.commands.options import JsonFile, Model, Picture, Settings
from pipeline.console import say
from storage.errors import FlashringError
from workers.lab.bench.soak.clients import TIMEOUT, Crowd, Tally, answers, pool, quantiles
from workers.lab.bench.soak.running import WORKERS, Running, running
from workers.lab.bench.soak.vitals import Clock, Recorder, draw, growth, not_flat

CLIENTS = {"zeromq": 2, "leaver": 2, "slow": 2, "http": 2, "stream": 2}


def main(
    model: Model = "",
    minutes: Annotated[float, typer.Option(help="Length of the run.", min=0.1)] = 30.0,
    death: Annotated[float, typer.Option(help="Seconds from one death to the next; 0: none.", min=0)] = 120.0,
    every: Annotated[float, typer.Option(help="Seconds between two looks.", min=0.1)] = 5.0,
    seed: Annotated[int, typer.Option(help="Of prompts and deaths.")] = 0,
    settings: Settings = None,
    picture: Picture = None,
    json_file: JsonFile = None,
) -> None:
    """Serve random prompts for a long time while clients leave and workers die; say what grew or is wrong."""
    arguments = [*(["--model", model] if model else []), "--context", "256", "--queue", "64"]
    for setting in settings or ("cache.share=0.25", "storage.verify=always", "compute.threads=1"):
        arguments += ["--set", setting]
    tally, deaths = Tally(), list[float]()
    with tempfile.TemporaryDirectory(prefix="soak-") as name, running(Path(name), arguments) as server:
        questions = pool(seed)
        right = answers(server, questions)
        ended = threading.Event()
        clock = Clock()
        recorder = Recorder(server, Path(name), every, clock)
        threads = Crowd(server, questions, right, tally, ended).start(CLIENTS)
        try:
            _run(server, minutes * 60, death, random.Random(seed), deaths, clock)
        finally:
            ended.set()
            for thread in threads:
                thread.join(TIMEOUT)
            recorder.end()
        after = answers(server, questions)
        lines = server.lines
    left = [str(one) for one in Path(name).rglob("*")] if Path(name).exists() else []
    taken = recorder.taken
    found = growth(taken) if len(taken) >= 9 else {}
    result = {
        "minutes": minutes,
        "deaths": [round(one, 2) for one in deaths],
        "ends": dict(sorted(tally.ends.items())),
        "wrong": tally.wrong,
        "same_texts_afterwards": after == right,
        "waiting_seconds": quantiles(tally.waits),
        "growth": found,
        "first": asdict(taken[0]) if taken else {},
        "last": asdict(taken[-1]) if taken else {},
        "left": left,
        "lines": lines,
    }
    if picture is not None:
        draw(picture, taken, deaths)
        say(f"wrote {picture}")
    print(json.dumps(result, indent=2))
    if json_file is not None:
        json_file.write_text(
            json.dumps({**result, "vitals": [asdict(one) for one in taken]}), encoding="utf-8"
        )
    problems = [*tally.wrong[:3], *not_flat(found)] if found else tally.wrong[:3]
    if after != right:
        problems.append("the texts afterwards are others than before")
    if problems:
        raise FlashringError("; ".join(problems))


def _run(
    server: Running, seconds: float, death: float, draw: random.Random, deaths: list[float], clock: Clock
) -> None:
    """Wait, and kill a worker now and then. Raises FlashringError where the server ends."""
    due = death or seconds
    while (passed := clock.tick()) < seconds:
        if server.process.poll() is not None:
            raise FlashringError(f"the server has ended: {' '.join(server.lines[-2:])}")
        if death and passed >= due:
            due += death
            if server.kill(draw.choice(WORKERS)):
                deaths.append(passed / 60)
        time.sleep(0.5)


def run() -> int:
    """The command line's exit status."""
    return program.single(main)


if __name__ == "__main__":
    sys.exit(run())
