"""`python -m workers.lab.evaluation`: the program behind `run.py evaluate`."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated

import torch
import typer

from pipeline import program
from pipeline.commands.options import Bits, ConfigFile, Model, Picture, Quality, Settings
from pipeline.config import Config
from pipeline.console import tables
from pipeline.cores import thread_count
from pipeline.models.names import configure
from pipeline.planner.resolve import resolve
from storage.errors import UsageError
from storage.store import Store
from storage.tokenizer import load_tokenizer
from workers.lab.evaluation import report
from workers.lab.evaluation.bars import Bars
from workers.lab.evaluation.curve import __main__ as curve
from workers.lab.evaluation.evaluate import LONGEST_CHUNK, chunks, evaluate_task, evaluate_text
from workers.lab.evaluation.points import Point, draw, measure, table
from workers.lab.evaluation.tasks import TASKS, read_text
from workers.lab.offline.chooser import make_chooser
from workers.lab.offline.dense import DenseModel
from workers.lab.training.texts import documents, rows


def main(
    model: Model = "",
    bits: Bits = None,
    quality: Quality = "",
    tasks: Annotated[str, typer.Option(help=f"Some of {','.join(TASKS)}, by commas.")] = "",
    data: Annotated[Path | None, typer.Option(help="The directory with a file for every task.")] = None,
    text: Annotated[Path | None, typer.Option(help="A text whose perplexity is wanted; may be .xz.")] = None,
    limit: Annotated[int, typer.Option(help="Items of each task; 0: all.", min=0)] = 0,
    tokens: Annotated[int, typer.Option(help="Tokens of the text; 0: all.", min=0)] = 0,
    point: Annotated[
        list[str] | None,
        typer.Option(help='Settings to compare on the text: "NAME: section.key=value …"; may be repeated.'),
    ] = None,
    thresholds: Annotated[
        str, typer.Option(help="A point for each of these predictor.threshold, by commas.")
    ] = "",
    oracle_curve: Annotated[
        bool,
        typer.Option(
            "--oracle-curve",
            help="What it costs to give only the best neurons their true rows; see docs/dial.md.",
        ),
    ] = False,
    calibration: Annotated[
        Path | None, typer.Option(help="The curve's other text, for centres and thresholds.")
    ] = None,
    picture: Picture = None,
    seed: Annotated[int, typer.Option(help="Seed of the bootstrap.", min=0)] = 0,
    threads: Annotated[int, typer.Option(help="Threads; 0: one for each CPU.", min=0)] = 0,
    config_file: ConfigFile = None,
    settings: Settings = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Compare the sparse model with the dense one, on the same text and questions."""
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    if oracle_curve:
        if text is None or calibration is None:
            raise UsageError("--oracle-curve needs --text FILE, and --calibration with another text")
        asked = curve.usual(text, calibration, tokens)
        source, _ = configure(model, config_file, settings or (), {"model": {"bits": bits}})
        curve.tell(source.open_store(), asked, seed, threads, as_json)
        return
    _check(names, data, text)
    if tokens == 1:
        raise UsageError("--tokens 1 is too few: perplexity is of the tokens that follow others")
    source, config = configure(
        model,
        config_file,
        settings or (),
        {"model": {"bits": bits}, "predictor": {"quality": quality or None}},
    )
    store = source.open_store()
    config = resolve(store, config).config
    named = _points(
        [*(point or ()), *(f"{one}: predictor.threshold={one}" for one in thresholds.split(",") if one)]
    )
    points = [
        (name, configure(model, config_file, [*(settings or ()), *some])[1], some) for name, some in named
    ]
    if points:
        if text is None:
            raise UsageError("points are compared on a text: give --text FILE")
        if names:
            raise UsageError("points are compared on a text alone: leave out --tasks, or the points")
        compared = _compare(store, points, text, tokens, seed, threads)
        if as_json:
            print(json.dumps({"model": store.manifest.name, "points": [asdict(one) for one in compared]}))
        else:
            tables().print(table(compared))
        if picture:
            draw(compared, picture)
        return
    if picture:
        raise UsageError("--picture shows points: give --point or --thresholds")
    found = _evaluate(store, config, names, data, text, limit, tokens, seed, threads)
    if as_json:
        plain = {"text": found.text and asdict(found.text), "tasks": [asdict(one) for one in found.tasks]}
        print(json.dumps({"model": store.manifest.name, **plain, "config": config.model_dump(mode="json")}))
    else:
        _print(found, config)


def _points(texts: list[str]) -> list[tuple[str, tuple[str, ...]]]:
    """Name and settings of every point."""
    found = []
    for text in texts:
        name, colon, settings = text.partition(": ")
        if not colon:
            raise UsageError(f'--point takes "NAME: section.key=value …", not {text!r}')
        found.append((name.strip(), tuple(settings.split())))
    return found


def _compare(
    store: Store,
    points: list[tuple[str, Config, tuple[str, ...]]],
    text: Path,
    tokens: int,
    seed: int,
    threads: int,
) -> list[Point]:
    with Bars() as bars, torch.no_grad():
        some = rows(text, store, tokens or sys.maxsize)
        with DenseModel(store, thread_count(threads)) as model:
            return measure(model, points, some, seed, bars.tell)


@dataclass(slots=True)
class _Found:
    """Reports, as far as they are asked for."""

    text: report.TextReport | None = None
    tasks: list[report.TaskReport] = field(default_factory=list)


def _check(names: list[str], data: Path | None, text: Path | None) -> None:
    unknown = next((name for name in names if name not in TASKS), None)
    if unknown is not None:
        raise UsageError(f"unknown task {unknown!r}; known: {', '.join(TASKS)}")
    if names and data is None:
        raise UsageError("--tasks needs --data DIR, the directory of the tasks' files")
    if not names and text is None:
        raise UsageError("nothing to evaluate: give --text FILE, or --tasks with --data")


def _evaluate(
    store: Store,
    config: Config,
    names: list[str],
    data: Path | None,
    text: Path | None,
    limit: int,
    tokens: int,
    seed: int,
    threads: int,
) -> _Found:
    found = _Found()
    with (
        Bars() as bars,
        torch.no_grad(),
        DenseModel(store, thread_count(threads)) as model,
    ):
        tokenizer = load_tokenizer(store)
        chooser = make_chooser(store, config)
        if text is not None:
            length = min(LONGEST_CHUNK, config.compute.context)
            if length < 2:
                raise UsageError("compute.context 1 is too little: perplexity is of later tokens")
            lines = "jsonl" in text.name
            words = "\n\n".join(documents(text)) if lines else read_text(text)
            sequences, size = chunks(tokenizer, words, length, tokens or None)
            found.text = evaluate_text(model, chooser, sequences, size, seed, bars.tell)
        for name in names:
            assert data is not None
            found.tasks.append(evaluate_task(model, chooser, tokenizer, name, data, limit or None, bars.tell))
    return found


def _print(found: _Found, config: Config) -> None:
    console = tables()
    sparse = config.predictor
    console.print(
        f"sparse: kind {sparse.kind}, look-ahead {sparse.lookahead}, "
        f"{'refine' if sparse.refine else 'no refine'}, threshold {sparse.threshold:g}"
    )
    if found.text is not None:
        console.print(report.text_table(found.text))
    if found.tasks:
        console.print(report.task_table(found.tasks))


def run() -> int:
    """The command line's exit status."""
    return program.single(main)


if __name__ == "__main__":
    sys.exit(run())
