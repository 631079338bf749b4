"""A file of prompts through many rings, by Ray Data.

    python -m workers.lab.cluster.prompts prompts.jsonl answers --model opt-6.7b --memory 7GiB --rings 4

Each line of the file is a JSON object with a `prompt`, and perhaps a `seed`. Each line of the answers has what the
prompt's line had, and a `text`. A text does not depend on the ring that wrote it.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from pipeline import Pipeline, program
from pipeline.commands.options import Context, Memory, Model, Settings
from pipeline.console import say
from storage.errors import UsageError
from workers.lab.cluster.ring import Cpus, RingOptions, start_ray

BLOCKS = 4  # for each ring: so many times it gets new prompts


class Ring:
    """An actor of Ray Data: one ring, which continues one prompt after another."""

    def __init__(self, options: RingOptions, max_new_tokens: int) -> None:
        self._pipeline = Pipeline.open(
            options.model, memory=options.memory, context=options.context, settings=options.settings
        )
        self._max_new_tokens = max_new_tokens

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        answer = self._pipeline.generate(
            row["prompt"], max_new_tokens=self._max_new_tokens, seed=int(row.get("seed") or 0)
        )
        return {**row, "text": "".join(answer)}


def main(
    prompts: Annotated[Path, typer.Argument(help="A JSON-lines file.", metavar="FILE")],
    answers: Annotated[Path, typer.Argument(help="The directory of the answers.", metavar="DIR")],
    model: Model = "",
    memory: Memory = "",
    context_tokens: Context = 0,
    settings: Settings = None,
    rings: Annotated[int, typer.Option(help="Rings.", min=1)] = 2,
    cpus: Cpus = 1.0,
    max_new_tokens: Annotated[int, typer.Option(help="Stop each text after this many tokens.", min=1)] = 200,
) -> None:
    """Continue every prompt of a file, by many rings at once."""
    if not prompts.is_file():
        raise UsageError(f"{prompts} is no file")
    if answers.exists() and any(answers.iterdir()):
        raise UsageError(f"{answers} has files already")
    options = RingOptions(model, memory, context_tokens, tuple(settings or ()))
    resources = options.resources(cpus)
    start_ray()
    import ray

    try:
        ray.data.DataContext.get_current().execution_options.preserve_order = True
        rows = ray.data.read_json(str(prompts), lines=True).repartition(BLOCKS * rings)
        if "prompt" not in (rows.columns() or ()):
            raise UsageError(f"the lines of {prompts} have no prompt")
        texts = rows.map(
            Ring,
            fn_constructor_args=(options, max_new_tokens),
            compute=ray.data.ActorPoolStrategy(size=rings),
            **resources,
        )
        texts.write_json(str(answers))
        say(f"wrote {answers}")
    finally:
        ray.shutdown()


if __name__ == "__main__":
    sys.exit(program.single(main))
