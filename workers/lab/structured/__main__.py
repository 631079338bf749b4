"""`bench-structured`: answers by ten schemas, each checked, and what a mask costs a token."""

from __future__ import annotations

import json
import sys
from typing import Annotated

import typer

from pipeline import program
from pipeline.commands.options import Context, Device, DeviceMemory, Memory, Model, Seed, Settings
from pipeline.config import Values
from pipeline.console import say
from pipeline.models.names import configure
from pipeline.planner.divide import plan
from pipeline.status import waiting
from storage.errors import FlashringError


def main(
    model: Model = "",
    memory: Memory = "",
    device: Device = "",
    device_memory: DeviceMemory = "",
    context_tokens: Context = 0,
    settings: Settings = None,
    answers: Annotated[int, typer.Option(help="How many, the ten questions in turns.", min=1)] = 200,
    temperature: Annotated[float, typer.Option(help="Of the sampling.", min=0)] = 1.0,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens of one answer, at most.", min=1)] = 400,
    seed: Seed = 0,
) -> None:
    """Answer ten questions by their JSON schemas, check every answer, and time the masks; prints JSON."""
    from pipeline.ring.session import Session
    from workers.lab.structured.measure import measure

    values: Values = {
        "memory": {"budget": memory or None},
        "compute": {
            "context": context_tokens or None,
            "device": device or None,
            "device_memory": device_memory or None,
            "structured": True,
        },
    }
    source, config = configure(model, None, settings or (), values)
    store = source.open_store()
    report = plan(store, config)
    with Session(store, report.config, report.plan, budget=report.budget) as session, waiting("answering"):
        result = measure(
            session,
            answers=answers,
            temperature=temperature,
            max_new_tokens=max_new_tokens,
            seed=seed,
            say=say,
        )
    print(json.dumps({"model": store.manifest.name, "temperature": temperature, **result}, indent=2))
    if result["valid"] < result["answers"]:
        raise FlashringError(f"{result['answers'] - result['valid']} answers do not follow their schemas")


def run() -> int:
    """The command line's exit status."""
    return program.single(main)


if __name__ == "__main__":
    sys.exit(run())
