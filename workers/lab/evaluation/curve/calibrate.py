"""`python -m workers.lab.evaluation.curve.calibrate`: the program behind `run.py calibrate`.

Learns centres and thresholds from a text, decides the dial's points on a part of it that nothing was learned
from, and writes them into the store (`storage/dial.py`), if its low-bit format is one that stores can hold.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from math import inf
from pathlib import Path
from typing import Annotated, TypeVar

import typer
from rich.table import Table

from pipeline import program
from pipeline.commands.options import Bits, Memory, Model
from pipeline.console import say, tables
from pipeline.cores import thread_count
from pipeline.models.names import configure
from pipeline.planner.budget import parse_budget
from storage.codecs import CODECS
from storage.dial import DIAL, write_dial
from storage.errors import UsageError
from storage.tokenizer import load_tokenizer
from workers.lab.evaluation.bars import Bars
from workers.lab.evaluation.curve.copies import Copy
from workers.lab.evaluation.curve.decide import QUICK, USUAL, WAYS, Ways, decide, described
from workers.lab.evaluation.curve.journal import Journal
from workers.lab.evaluation.curve.measure import Measured, measure
from workers.lab.evaluation.curve.passes import Passes
from workers.lab.evaluation.curve.questions import ask
from workers.lab.evaluation.curve.table import measured_table
from workers.lab.evaluation.curve.variant import Variant, plain
from workers.lab.evaluation.report import TaskReport
from workers.lab.evaluation.statistics import Estimate
from workers.lab.evaluation.tasks import TASKS
from workers.lab.training.texts import rows

BESIDE = "q8,q4"
T = TypeVar("T")
TEXT = Path(__file__).with_name("mixed.txt")
PARTIAL = "dial.partial"  # in the store: what an interrupted measurement has found so far


@dataclass(frozen=True, slots=True)
class _Sizes:
    """Tokens."""

    tokens: int
    held_out: int
    length: int


def _sizes(quick: bool, tokens: int | None, held_out: int | None, length: int | None) -> _Sizes:
    usual = _Sizes(1024, 2048, 256) if quick else _Sizes(4096, 4096, 512)
    return _Sizes(tokens or usual.tokens, held_out or usual.held_out, length or usual.length)


def _ways(more: str) -> tuple[Ways, ...]:
    """The one that a ring runs, and those that stand beside it. Raises UsageError for an unknown one."""
    found: list[Ways] = ["low"]
    for name in _names(more):
        way = next((one for one in WAYS if one == name), None)
        if way is None:
            raise UsageError(f"--ways takes {' and '.join(WAYS[1:])}, by commas, not {name!r}")
        found.append(way)
    return tuple(found)


def _names(text: str) -> list[str]:
    """By commas."""
    return [name.strip() for name in text.split(",") if name.strip()]


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
    text: Annotated[
        Path | None,
        typer.Option(
            help="A text to learn from, and to choose by; may be .xz. [default: one of mixed prose]",
            show_default=False,
        ),
    ] = None,
    model: Model = "",
    bits: Bits = None,
    copy: Annotated[str, typer.Option(help="Format of the low-bit copy, as q4 or q8.")] = "q4",
    quick: Annotated[
        bool, typer.Option("--quick", help="Few tokens and settings, as the first use of a model has them.")
    ] = False,
    tokens: Annotated[
        int | None, typer.Option(help="Tokens to learn from. [default: 4096]", min=8, show_default=False)
    ] = None,
    held_out: Annotated[
        int | None,
        typer.Option(help="Tokens behind those, to choose by. [default: 4096]", min=8, show_default=False),
    ] = None,
    length: Annotated[
        int | None, typer.Option(help="Tokens of a chunk. [default: 512]", min=2, show_default=False)
    ] = None,
    ways: Annotated[
        str,
        typer.Option(
            help="Measured beside what a ring runs: down (true down rows alone), mean (the others' means)."
        ),
    ] = "",
    memory: Memory = "",
    test: Annotated[Path | None, typer.Option(help="Another text, to tell each point's cost on.")] = None,
    test_tokens: Annotated[int, typer.Option(help="Of that text.", min=2)] = 8192,
    beside: Annotated[
        str, typer.Option(help="Plain low-bit models that stand beside the points there, by commas.")
    ] = BESIDE,
    tasks: Annotated[str, typer.Option(help=f"Some of {','.join(TASKS)}, by commas.")] = "",
    data: Annotated[Path | None, typer.Option(help="The directory with a file for every task.")] = None,
    limit: Annotated[int, typer.Option(help="Items of each task; 0: all.", min=0)] = 500,
    seed: Annotated[int, typer.Option(help="Seed of the bootstrap.", min=0)] = 0,
    threads: Annotated[int, typer.Option(help="Threads; 0: one for each CPU.", min=0)] = 0,
    shown_tables: Annotated[
        bool, typer.Option("--tables/--no-tables", help="Print what was measured.")
    ] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Decide which neurons of a model without zeros get their true rows, at each quality of its dial."""
    sizes = _sizes(quick, tokens, held_out, length)
    effort = replace(QUICK if quick else USUAL, ways=_ways(ways))
    Copy.of(copy)
    names = _names(tasks)
    others = _names(beside) if test or names else []
    if names and data is None:
        raise UsageError("--tasks needs --data DIR, the directory of the tasks' files")
    source, _ = configure(model, None, (), {"model": {"bits": bits}})
    store = source.open_store()
    if store.architecture.sparse:
        raise UsageError(f"{store.manifest.name} has zeros: its dial is its predictors' threshold")
    text = text or TEXT
    budget = parse_budget(memory, store, "--memory")
    with Bars() as bars:
        learned = rows(text, store, sizes.tokens, longest=sizes.length)
        behind = rows(text, store, sizes.held_out, skip=learned.size, longest=sizes.length)
        passes = Passes(store, [copy, *others], thread_count(threads), budget)
        journal = Journal(store.path / PARTIAL)
        decided = decide(passes, learned, behind, copy, seed, bars.tell, effort, journal)
        points = [point.result for point in decided.points.values()]
        if copy in CODECS:
            write_dial(store, described(store, decided, text.name, learned.size, behind.size))
        report = _Report(decided.path, points)
        if told := shown_tables and not as_json:  # each as soon as it is there: tasks take their time
            tables().print(measured_table(f"held out; default: {decided.default}", points))
        shown = [one.variant for one in points] + [plain(name) for name in others]
        once = list({_alike(one): one for one in shown}.values())  # points may be one and the same
        centres = decided.calibration.centres
        if test is not None:
            some = rows(test, store, test_tokens, longest=sizes.length)
            found = measure(
                passes, some, once, centres, seed, lambda *at: bars.tell("test", *at), journal.stage("test")
            )
            report.test = [
                found[0],
                *(replace(one, variant=variant) for variant, one in _each(shown, once, found[1:])),
            ]
            if told:
                tables().print(measured_table("test", report.test))
        for name in names:
            assert data is not None
            answered = ask(
                passes,
                load_tokenizer(store),
                name,
                data,
                limit,
                once,
                centres,
                bars.tell,
                journal.stage(name),
            )
            report.tasks[name] = [one for _, one in _each(shown, once, answered)]
            if told:
                tables().print(_answers(report.tasks[name], [one.name for one in shown]))
    journal.close()
    if copy in CODECS:
        say(f"the dial lies in {store.path / DIAL}; its default is {decided.default}")
    else:
        say(f"stores cannot hold {copy}: the dial was measured, and is not kept")
    if as_json:
        print(json.dumps({"model": store.manifest.name, "default": decided.default, **asdict(report)}))


def _alike(variant: Variant) -> Variant:
    """The same by whatever name; a threshold that all layers keep to with no neuron is no threshold."""
    if variant.thresholds is not None and all(one == inf for one in variant.thresholds):
        variant = plain(variant.copy or "")
    return replace(variant, name="")


def _each(
    shown: Sequence[Variant], once: Sequence[Variant], found: Sequence[T]
) -> Iterator[tuple[Variant, T]]:
    """What was found of each, where only different ones were measured."""
    known = {_alike(variant): one for variant, one in zip(once, found, strict=True)}
    return ((variant, known[_alike(variant)]) for variant in shown)


def _answers(found: Sequence[TaskReport], names: Sequence[str]) -> Table:
    """One task, a variant a row, below the exact model."""
    first = found[0]
    shown = Table(f"{first.task}, {first.items:,} items", "right", "apart from exact", "right, per byte")
    shown.add_row("exact", first.dense.percent(), "", _percent(first.dense_normalised))
    for name, one in zip(names, found, strict=True):
        shown.add_row(name, one.sparse.percent(), one.difference.percent(), _percent(one.sparse_normalised))
    return shown


def _percent(share: Estimate | None) -> str:
    return "–" if share is None else share.percent()


def run() -> int:
    """The command line's exit status."""
    return program.single(main)


if __name__ == "__main__":
    sys.exit(run())
