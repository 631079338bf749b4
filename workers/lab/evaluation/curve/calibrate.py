"""`python -m workers.lab.evaluation.curve.calibrate`: the program behind `run.py calibrate`.

Learns centres and thresholds from a text, decides the dial's points on a part of it that nothing was learned
from, and writes them into the store (`storage/dial.py`), if its low-bit format is one that stores can hold.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated

import typer

from pipeline import program
from pipeline.commands.options import Bits, Model
from pipeline.console import say, tables
from pipeline.cores import thread_count
from pipeline.models.names import configure
from storage.codecs import CODECS
from storage.dial import DIAL, write_dial
from storage.errors import UsageError
from storage.tokenizer import load_tokenizer
from workers.lab.evaluation.bars import Bars
from workers.lab.evaluation.curve.copies import Copy
from workers.lab.evaluation.curve.decide import decide, described
from workers.lab.evaluation.curve.measure import Measured, measure
from workers.lab.evaluation.curve.passes import Passes
from workers.lab.evaluation.curve.questions import ask
from workers.lab.evaluation.curve.table import measured_table
from workers.lab.evaluation.curve.variant import plain
from workers.lab.evaluation.report import TaskReport, task_table
from workers.lab.evaluation.tasks import TASKS
from workers.lab.training.texts import rows

BESIDE = ("q8", "q4")  # plain models that stand beside the points on another text


@dataclass(slots=True)
class _Report:
    """What was measured, for people and programs."""

    path: list[Measured]  # every setting on the held-out text
    points: list[Measured]
    test: list[Measured] = field(default_factory=list)
    tasks: dict[str, list[TaskReport]] = field(
        default_factory=dict
    )  # of the test's variants but the exact one


def main(
    text: Annotated[Path, typer.Option(help="A text to learn from, and to choose by; may be .xz.")],
    model: Model = "",
    bits: Bits = None,
    copy: Annotated[str, typer.Option(help="Format of the low-bit copy, as q4 or q8.")] = "q4",
    tokens: Annotated[int, typer.Option(help="Tokens to learn from.", min=8)] = 4096,
    held_out: Annotated[int, typer.Option(help="Tokens behind those, to choose by.", min=8)] = 4096,
    length: Annotated[int, typer.Option(help="Tokens of a chunk.", min=2)] = 512,
    test: Annotated[Path | None, typer.Option(help="Another text, to tell each point's cost on.")] = None,
    test_tokens: Annotated[int, typer.Option(help="Of that text.", min=2)] = 8192,
    tasks: Annotated[str, typer.Option(help=f"Some of {','.join(TASKS)}, by commas.")] = "",
    data: Annotated[Path | None, typer.Option(help="The directory with a file for every task.")] = None,
    limit: Annotated[int, typer.Option(help="Items of each task; 0: all.", min=0)] = 500,
    seed: Annotated[int, typer.Option(help="Seed of the bootstrap.", min=0)] = 0,
    threads: Annotated[int, typer.Option(help="0: as many as there are CPUs.", min=0)] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Decide which neurons of a model without zeros get their true rows, at each quality of its dial."""
    Copy.of(copy)
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    if names and data is None:
        raise UsageError("--tasks needs --data DIR, the directory of the tasks' files")
    source, _ = configure(model, None, (), {"model": {"bits": bits}})
    store = source.open_store()
    if store.architecture.sparse:
        raise UsageError(f"{store.manifest.name} has zeros: its dial is its predictors' threshold")
    learned = rows(text, store, tokens, longest=length)
    behind = rows(text, store, held_out, skip=learned.size, longest=length)
    passes = Passes(store, [copy, *(BESIDE if test or names else ())], thread_count(threads))
    with Bars() as bars:
        decided = decide(passes, learned, behind, copy, seed, bars.tell)
        points = [point.result for point in decided.points.values()]
        report = _Report(decided.path, points)
        beside = [one.variant for one in points] + [plain(name) for name in BESIDE]
        centres = decided.calibration.centres
        if test is not None:
            some = rows(test, store, test_tokens, longest=length)
            report.test = measure(passes, some, beside, centres, seed, lambda *at: bars.tell("test", *at))
        for name in names:
            assert data is not None
            report.tasks[name] = ask(
                passes, load_tokenizer(store), name, data, limit, beside, centres, bars.tell
            )
    if copy in CODECS:
        write_dial(store, described(store, decided, text.name, learned.size, behind.size))
        say(f"the dial lies in {store.path / DIAL}; its default is {decided.default}")
    else:
        say(f"stores cannot hold {copy}: the dial was measured, and is not kept")
    if as_json:
        print(json.dumps({"model": store.manifest.name, "default": decided.default, **asdict(report)}))
    else:
        _print(report, decided.default, [one.name for one in beside])


def _print(report: _Report, default: str, names: Sequence[str]) -> None:
    console = tables()
    console.print(measured_table(f"held out; default: {default}", report.points))
    if report.test:
        console.print(measured_table("test", report.test))
    for found in report.tasks.values():
        for name, one in zip(names, found, strict=True):
            console.print(name)
            console.print(task_table([one]))


def run() -> int:
    """The command line's exit status."""
    return program.single(main)


if __name__ == "__main__":
    sys.exit(run())
