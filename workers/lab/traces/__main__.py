"""`python -m workers.lab.traces`: the program behind `run.py trace`."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer

from pipeline import program
from pipeline.commands.options import ConfigFile, Model, Picture, Settings
from pipeline.config import Cache
from pipeline.console import say, tables
from pipeline.cores import thread_count
from pipeline.directories import check_writable
from pipeline.models.names import configure
from pipeline.planner import rates
from pipeline.planner.resolve import resolve
from pipeline.progress import Progress
from pipeline.status import waiting
from storage.errors import UsageError
from storage.files import replacing
from storage.store import Store
from workers.cache.policies import make_policy
from workers.cache.policy import Policy
from workers.lab.offline import pool, record, ring
from workers.lab.offline.chooser import make_chooser
from workers.lab.offline.dense import DenseModel
from workers.lab.offline.trace import Trace
from workers.lab.traces import activity, comparison, placement, report
from workers.lab.traces.order import linear_order
from workers.lab.traces.windows import windows as count_windows
from workers.lab.training.texts import rows

app = program.make()
LONGEST_WINDOW = 8  # tokens

File = Annotated[Path, typer.Argument(metavar="TRACE")]


@app.callback()
def trace_command() -> None:
    """Record which neurons a text uses, and replay it against cache policies."""


@app.command("record")
def record_command(
    out: File,
    text: Annotated[Path, typer.Option(help='Text, or .jsonl with "text"; may be .xz.')],
    model: Model = "",
    tokens: Annotated[
        int, typer.Option(help="Most tokens of the text, recorded in whole rows of up to 512.", min=1)
    ] = 4096,
    skip: Annotated[int, typer.Option(help="Tokens of the text to leave out first.", min=0)] = 0,
    threads: Annotated[int, typer.Option(help="Threads; 0: one for each CPU.", min=0)] = 0,
    config_file: ConfigFile = None,
    settings: Settings = None,
) -> None:
    """Record which neurons a text uses: with predictors as the ring would, else (kind all) densely.

    Of a mixture of experts a ring decodes the text, and its experts are recorded.
    """
    check_writable(out)
    source, config = configure(model, config_file, settings or ())
    store = source.open_store()
    if not (store.architecture.sparse or store.architecture.mixture):
        raise UsageError(f"{store.manifest.name} is not a ReLU model: every neuron is active")
    if threads:
        config = config.replace(compute={"threads": threads})
    config = resolve(store, config).config
    if store.architecture.mixture and config.predictor.kind != "router":
        raise UsageError("a mixture's trace is of what its routers choose: leave out predictor.kind")
    meta: dict[str, object] = {"text": text.name, "config": config.predictor.model_dump(mode="json")}
    with Progress("recording", "tokens") as bars:
        some, progress = rows(text, store, tokens, skip), bars.counting("trace")
        if store.architecture.mixture:
            trace = ring.record(store, config, some, meta, progress)
        else:
            with torch.no_grad(), DenseModel(store, thread_count(threads)) as dense:
                chooser = make_chooser(store, config, in_order=True)
                trace = record.record(dense, chooser, some, meta, progress)
    trace.save(out)
    rows_of = f"{len(some)} rows of {some.shape[1]}" if len(some) > 1 else "one row"
    say(f"{out}: {trace.tokens:,} tokens ({rows_of}), {trace.layers} layers")


@app.command("replay")
def replay_command(
    file: File,
    earlier: Annotated[
        Path | None, typer.Option(help="A trace of other text, which tells the hot neurons; without: TRACE.")
    ] = None,
    capacities: Annotated[str, typer.Option(help="Slots, as shares of the FFN.")] = "0.1,0.2,0.3,0.5",
    windows: Annotated[str, typer.Option(help="Windows of the paper's policy, in tokens.")] = "5",
    half_lives: Annotated[str, typer.Option(help="Half-lives of LRFU, in tokens.")] = "8,32,128",
    active: Annotated[
        bool, typer.Option("--active", help="Replay the active neurons, whatever was predicted.")
    ] = False,
    warm_up: Annotated[int, typer.Option(help="First tokens, which are not counted.", min=0)] = 64,
    picture: Picture = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Compare cache policies on a trace, by the ring's own residency.

    Of experts, slots are also divided among layers by need, as the earlier trace tells it, or are one pool.
    """
    trace = Trace.load(file)
    calibration = Trace.load(earlier) if earlier else trace
    if (calibration.layers, calibration.d_ff) != (trace.layers, trace.d_ff):
        raise UsageError(f"{earlier} and {file} are traces of different models")
    if warm_up + LONGEST_WINDOW >= trace.tokens:
        raise UsageError(f"{file} has only {trace.tokens} tokens")
    if active:
        trace, calibration = trace.only_active(), calibration.only_active()
    shares = _numbers(capacities)
    if trace.top_k > round(min(shares) * trace.d_ff):
        raise UsageError(
            f"{min(shares):g} of {trace.d_ff} experts are fewer than the {trace.top_k} of a token"
        )
    lengths = [round(window) for window in _numbers(windows)]
    results = []
    with Progress("replaying", "runs") as bars:
        made = comparison.runs(trace, calibration, lengths, _numbers(half_lives), warm_up)
        for capacity in shares:
            for name, run_with in made.items():
                results.append(report.Result(name, capacity, run_with(round(capacity * trace.d_ff))))
                bars("policies", len(results), len(shares) * len(made))
        counted = count_windows(trace, LONGEST_WINDOW)
    if as_json:
        print(json.dumps(report.to_json(results, counted, trace)))
    else:
        console = tables()
        console.print(report.policy_table(results, trace))
        console.print(report.window_table(counted))
    if picture:
        report.draw(results, counted, picture)


@app.command("activity")
def activity_command(
    file: File,
    window: Annotated[int, typer.Option(help="Tokens.", min=1, max=LONGEST_WINDOW)] = 5,
    picture: Picture = None,
) -> None:
    """How much of the FFN a token, and a window of tokens, uses in every layer."""
    trace = Trace.load(file)
    if trace.tokens <= LONGEST_WINDOW:
        raise UsageError(f"{file} has only {trace.tokens} tokens")
    with waiting("counting"):
        layers, mean = activity.activity(trace, LONGEST_WINDOW), count_windows(trace, LONGEST_WINDOW)
    console = tables()
    console.print(activity.table(layers, mean, window))
    console.print(report.window_table(mean))
    if picture:
        activity.draw(layers, mean, picture)


@app.command("needs")
def needs_command(
    file: File,
    model: Annotated[Path, typer.Option("--store", help="The store that TRACE is of.", metavar="STORE")],
) -> None:
    """Write into a mixture's store what each layer needs, by which slots are divided from then on."""
    trace, store = Trace.load(file), Store.open(model)
    if not trace.top_k:
        raise UsageError(f"{file} is no trace of experts: neurons' slots are the same number in every layer")
    if trace.meta.get("store") != store.identity:
        raise UsageError(f"{file} is no trace of {model}")
    with waiting("replaying"):
        path = pool.needs(trace, store.layout.units, store.identity).write(store)
    say(f"{path}: {trace.layers} layers, by {trace.tokens:,} tokens")


@app.command("order")
def order_command(
    file: File,
    out: Annotated[Path, typer.Argument(metavar="ORDER.npy")],
    active: Annotated[
        bool, typer.Option("--active", help="By the active neurons, whatever was predicted.")
    ] = False,
) -> None:
    """Order neurons so that those used together lie together, for convert --order."""
    trace = Trace.load(file)
    with waiting("ordering"):
        order = linear_order(trace.only_active() if active else trace)
    with replacing(out) as opened:
        np.save(opened, order)
    say(
        f"{out}: {len(order)} layers of {order.shape[1]:,} neurons; to use it: "
        f"run.py convert MODEL STORE --order {out}"
    )


@app.command("placement")
def placement_command(
    file: File,
    earlier: Annotated[Path, typer.Option(help="A trace of other text, which order and friends come from.")],
    capacity: Annotated[float, typer.Option(help="Slots, as a share of the FFN.", min=0, max=1)] = 0.25,
    gap: Annotated[int, typer.Option(help="Bundles that may be read between two to join them.", min=0)] = 2,
    active: Annotated[
        bool, typer.Option("--active", help="Replay the active neurons, whatever was predicted.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Compare reads by neuron id, by co-activation, and with closest friends bundled.

    The disk's time is told by what it was measured to give in reads of each size (run.py doctor).
    """
    trace, calibration = Trace.load(file), Trace.load(earlier)
    if (calibration.layers, calibration.d_ff) != (trace.layers, trace.d_ff):
        raise UsageError(f"{earlier} and {file} are traces of different models")
    if active:
        trace, calibration = trace.only_active(), calibration.only_active()
    slots = round(capacity * trace.d_ff)

    def make(layer: int, slots: int) -> Policy:
        return make_policy(trace.d_ff, Cache())

    reading = rates.measured(say=say).reading
    with waiting("replaying"):
        order = linear_order(calibration)
        found = [
            placement.ordered("by id", trace, slots, make, None, reading),
            placement.ordered("by co-activation", trace, slots, make, order, reading),
            placement.ordered(f"by id, gaps up to {gap}", trace, slots, make, None, reading, gap),
            placement.ordered(f"by co-activation, gaps up to {gap}", trace, slots, make, order, reading, gap),
            placement.befriended("closest friends bundled", trace, calibration, slots, make, reading),
        ]
    if as_json:
        print(json.dumps([{**asdict(one), "run": one.run} for one in found]))
    else:
        tables().print(placement.table(found))


def _numbers(text: str) -> list[float]:
    """Positive numbers, separated by commas. Raises UsageError."""
    try:
        found = [float(word) for word in text.split(",")]
    except ValueError:
        found = []
    if not found or not all(0 < one < math.inf for one in found):
        raise UsageError(f"{text!r} is no list of positive numbers, such as 0.1,0.5")
    return found


def run() -> int:
    """The command line's exit status."""
    return program.run(app)


if __name__ == "__main__":
    sys.exit(run())
