"""A file of prompts through many rings, by Ray Data.

    python -m workers.lab.cluster.prompts prompts.jsonl answers.jsonl --model opt-6.7b --memory 7GiB --rings 4

Each line of the file is a JSON object with a `prompt`, and perhaps a `seed`. The answers have what the
lines had, and a `text`. A text does not depend on the ring that wrote it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from pipeline import Pipeline, program
from pipeline.commands.options import Context, Memory, Model, Settings
from pipeline.console import say
from pipeline.directories import check_writable
from storage.errors import UsageError
from storage.files import replacing
from workers.lab.cluster.ring import Cpus, RingOptions, start_ray, stop_ray

BLOCKS = 4  # for each ring: so many times it gets new prompts
TOLD = 100  # answers between two lines of progress


class Ring:
    """An actor of Ray Data: one ring, which continues one prompt after another."""

    def __init__(self, options: RingOptions, max_new_tokens: int) -> None:
        self._pipeline = Pipeline.open(
            options.model, memory=options.memory, context=options.context, settings=options.settings
        )
        self._max_new_tokens = max_new_tokens

    def __call__(self, row: dict[str, Any]) -> dict[str, str]:
        """`line`: what a line of prompts says; back comes the `line` of its answer."""
        asked = json.loads(row["line"])
        answer = self._pipeline.generate(
            asked["prompt"], max_new_tokens=self._max_new_tokens, seed=asked.get("seed", 0)
        )
        return {"line": json.dumps({**asked, "text": "".join(answer)}, ensure_ascii=False)}

    def __del__(self) -> None:
        """Ray Data has no other word for the end of an actor."""
        self._pipeline.close()


def read(file: Path) -> list[dict[str, str]]:
    """The lines of a file of prompts, checked. Raises UsageError for one that is no prompt."""
    rows = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        try:
            asked = json.loads(line)
        except ValueError as error:
            raise UsageError(f"line {number} of {file} is no JSON: {error}") from error
        if not isinstance(asked, dict) or not isinstance(asked.get("prompt"), str):
            raise UsageError(f'line {number} of {file} has no text "prompt"')
        if type(asked.get("seed", 0)) is not int:
            raise UsageError(f'the "seed" in line {number} of {file} is no whole number')
        rows.append({"line": line})
    return rows


def main(
    prompts: Annotated[Path, typer.Argument(help="A JSON-lines file.", metavar="FILE")],
    answers: Annotated[Path, typer.Argument(help="The file of the answers.", metavar="ANSWERS")],
    model: Model = "",
    memory: Memory = "",
    context_tokens: Context = 0,
    settings: Settings = None,
    rings: Annotated[int, typer.Option(help="Rings.", min=1)] = 2,
    cpus: Cpus = 1.0,
    max_new_tokens: Annotated[int, typer.Option(help="Stop each text after this many tokens.", min=1)] = 200,
) -> None:
    """Continue every prompt of a file, by many rings at once."""
    rows = read(prompts)
    check_writable(answers)
    options = RingOptions(model, memory, context_tokens, tuple(settings or ()))
    resources = options.resources(cpus)
    start_ray()
    import ray

    try:
        context = ray.data.DataContext.get_current()
        context.execution_options.preserve_order = True
        context.enable_progress_bars = False
        texts = ray.data.from_items(rows, override_num_blocks=min(len(rows), BLOCKS * rings)).map(
            Ring,
            fn_constructor_args=(options, max_new_tokens),
            compute=ray.data.ActorPoolStrategy(size=rings),
            **resources,
        )
        with replacing(answers) as file:
            for done, row in enumerate(texts.iter_rows(), 1):
                file.write(row["line"].encode() + b"\n")
                if done % TOLD == 0:
                    say(f"{done} of {len(rows)} prompts are answered")
        say(f"wrote {answers}")
    finally:
        stop_ray()


if __name__ == "__main__":
    sys.exit(program.single(main))
