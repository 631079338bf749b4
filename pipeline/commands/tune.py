"""`tune`: searches for settings that are quicker on this machine, and writes them as a configuration file."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from pipeline.commands.options import Bits, ConfigFile, Context, Memory, Model, Quality, Settings
from pipeline.config import Config, Values
from pipeline.console import say, size, write_json
from pipeline.directories import check_writable
from pipeline.models.names import configure
from pipeline.planner import rates
from pipeline.planner.divide import PlanReport, plan
from pipeline.status import waiting
from storage.errors import UsageError
from storage.files import write_whole
from storage.store import Store

TOKENS = 32  # of a trial
TRIALS = 40  # that a search should have time for: slower models decode fewer tokens in each
WRITING = 0.1  # of the time, for the text
FEWEST = 6


def command(
    model: Model = "",
    memory: Memory = "",
    bits: Bits = None,
    quality: Quality = "",
    context_tokens: Context = 0,
    config_file: ConfigFile = None,
    settings: Settings = None,
    minutes: Annotated[float, typer.Option(help="Minutes that the search may take.", min=0.1)] = 10.0,
    out: Annotated[
        Path, typer.Option(help="The configuration file to write; one that is there is not touched.")
    ] = Path("tuned.toml"),
    tokens: Annotated[
        int, typer.Option(help=f"Tokens of a trial; 0: {TOKENS}, or fewer of a slow model.", min=0)
    ] = 0,
    prompt: Annotated[
        str, typer.Option(help="What the text of the trials begins with.")
    ] = "Once upon a time",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object at the end.")] = False,
) -> None:
    """Search for settings that are quicker on this machine.

    They are written as a configuration file. No text changes. Settings are compared by rings that decode the
    same tokens, in turn, and what is not quicker in medians stays as it was. Run it on a machine that does
    nothing else.
    """
    from pipeline.tuning import document, knobs, search, trial
    from pipeline.tuning.show import Show

    _check(out, tokens, prompt)
    deadline = time.monotonic() + 60 * minutes
    values: Values = {
        "model": {"bits": bits},
        "memory": {"budget": memory or None},
        "predictor": {"quality": quality or None},
        "compute": {"context": context_tokens or None},
    }
    source, config = configure(model, config_file, settings or (), values)
    store = source.open_store()
    report = plan(store, config)
    found = knobs.knobs(report.config, report.plan)
    say(f"{store.manifest.name}: {', '.join(one.key for one in found)}, for {minutes:g} min")
    with waiting("writing the trials' text"):
        patience = float("inf") if tokens else WRITING * 60 * minutes
        text = trial.own_text(store, config, prompt, tokens or TOKENS, patience)
    if not tokens:
        text = text.within((deadline - time.monotonic()) / TRIALS)

    beginning = knobs.start(report.config, found)
    with Show(beginning, deadline) as show:

        def measure(chosen: knobs.Settings) -> float:
            show.now(chosen)
            return trial.seconds(store, config, chosen, text)

        outcome = search.search(found, beginning, measure, lambda: deadline - time.monotonic(), show.tried)
    warmed = "whose first token does not count" if text.once else "warmed by the same tokens"
    trials = f"{outcome.measured} trials of {len(text.answer)} tokens, each by a ring of its own, {warmed}"
    about = [_about(store, config, report), trials]
    write_whole(out, document.document(outcome, about).encode())
    say(document.verdict(outcome))
    say(f"written to {out}; to use it: --config {out}")
    if as_json:
        write_json({"file": str(out), **document.to_json(outcome)})


def _check(out: Path, tokens: int, prompt: str) -> None:
    """Refuse before the work what would fail behind it."""
    check_writable(out)
    if out.exists():
        raise UsageError(f"{out} is there already: name another file with --out, or remove it")
    if 0 < tokens < FEWEST:
        raise UsageError(f"--tokens must be at least {FEWEST}, or 0")
    if not prompt:
        raise UsageError("the prompt is empty")


def _about(store: Store, config: Config, report: PlanReport) -> str:
    memory = size(report.total)
    within = f" of --memory {config.memory.budget}" if config.memory.budget else ""
    return f"{store.manifest.name} on {rates.processor()}; memory {memory}{within}"
