"""`plan`: what runs on this machine, how fast, and with how much memory; nothing is fetched or converted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.commands.options import Bits, ConfigFile, Context, Memory, Model, Quality, Settings
from pipeline.config import Values
from pipeline.console import say, size, tables, write_json
from pipeline.planner import pace, rates
from pipeline.planner.machine import available_bytes
from pipeline.planner.survey import PROMPT, Outlook, Range, fitting, outlook, span, subject
from storage.errors import UsageError

if TYPE_CHECKING:
    from rich.table import Table

SOURCES = {
    "disk": "waiting for the disk",
    "memory": "attention's weights, keys and values",
    "units": "FFN rows",
    "layers": "layers' own price",
    "head": "the head",
}


def command(
    model: Model = "",
    memory: Memory = "",
    bits: Bits = None,
    quality: Quality = "",
    context_tokens: Context = 0,
    config_file: ConfigFile = None,
    settings: Settings = None,
    probe: Annotated[
        bool, typer.Option("--probe", help="Measure this machine anew instead of using what is kept.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")] = False,
) -> None:
    """Tell what runs on this machine, and how fast.

    Nothing is fetched for it. Without --model it lists every preset in 16, 8 and 4 bits that fits. With it,
    it tells one model's memory, its time by source, the least memory that works, and the memory beyond which
    more does not help.
    """
    if model:
        values: Values = {
            "model": {"bits": bits},
            "memory": {"budget": memory or None},
            "predictor": {"quality": quality or None},
            "compute": {"context": context_tokens or None},
        }
        one = subject(model, config_file, settings or (), values)
        place = one.store.path if one.made else None
        known = rates.measured(place, tuple({*rates.CODECS, *one.codecs}), renew=probe, say=say)
        _tell_model(outlook(one, known), span(one, known), known, as_json=as_json)
        return
    if bits or quality or context_tokens or config_file or settings:
        raise UsageError(
            "--bits, --quality, --context, --config and --set are about one model: name it with --model"
        )
    known = rates.measured(renew=probe, say=say)
    budget = memory or f"{available_bytes()}B"
    found = list(fitting(known, budget))
    fits = [one for one in found if isinstance(one, Outlook)]
    left_out = [one for one in found if isinstance(one, str)]
    if as_json:
        write_json(
            {
                "memory": budget,
                "rates": rates.to_json(known),
                "models": [one.to_json() for one in fits],
                "left_out": left_out,
            }
        )
        return
    tables().print(_presets_table(fits))
    words = memory or f"{size(available_bytes())} that are available"
    say(f"memory: {words}; first answer: of a prompt of {PROMPT} tokens, with the ring's start")
    if left_out:
        say(f"too large: {', '.join(left_out)}")
    if any(one.subject.assumed for one in fits):
        say("ReLU models are taken to have predictors, which `run.py train-predictor` makes")
    say("run.py plan --model NAME tells more of one")


def _presets_table(fits: Sequence[Outlook]) -> Table:
    from rich.table import Table

    table = Table()
    for heading in (
        "model",
        "bits",
        "resident",
        "slots",
        "on flash",
        "MB a token",
        "tokens/s",
        "first answer",
    ):
        table.add_column(heading, justify="left" if heading == "model" else "right")
    for one in fits:
        said = one.to_json()
        table.add_row(
            one.subject.name,
            str(one.subject.bits),
            *(size(said[f"{part}_bytes"]) for part in ("resident", "slots", "flash")),
            f"{one.work.flash / 1e6:,.1f}",
            f"{1 / one.pace.total:,.1f}",
            f"{one.first_seconds:,.0f} s",
        )
    return table


def _tell_model(one: Outlook, range_: Range, known: pace.Rates, *, as_json: bool) -> None:
    if as_json:
        write_json(
            {
                **one.to_json(),
                "rates": rates.to_json(known),
                "least": range_.least.to_json(),
                "most": range_.most.to_json(),
                "enough_bytes": range_.enough,
                "curve": [{"memory_bytes": at, "seconds_per_token": taken} for at, taken in range_.curve],
            }
        )
        return
    from rich.table import Table

    console = tables()
    name = f"{one.subject.name} in {one.subject.bits} bits"
    for line in (name if one.subject.made else f"{name}, not converted yet", *one.report.lines):
        console.print(line, highlight=False)
    if one.subject.assumed:
        console.print(one.subject.assumed, highlight=False)
    table = Table()
    table.add_column("a token's time")
    table.add_column("ms", justify="right")
    for key, words in SOURCES.items():
        table.add_row(words, f"{1e3 * getattr(one.pace, key):,.1f}")
    table.add_row("together", f"{1e3 * one.pace.total:,.1f}", style="bold")
    console.print(table)
    for line in (*_details(one), *_range_lines(range_)):
        console.print(line, highlight=False)


def rate(tokens: float) -> str:
    """Tokens a second in two digits or whole ones, never with an exponent."""
    return f"{tokens:,.0f}" if tokens >= 10 else f"{tokens:.2g}"


def _details(one: Outlook) -> list[str]:
    lines = [
        f"{rate(1 / one.pace.total)} tokens/s; {one.work.flash / 1e6:,.1f} MB read a token; "
        f"first answer after {one.first_seconds:,.0f} s (a prompt of {PROMPT} tokens, the ring's start)"
    ]
    if one.hit_rate is not None:
        lines.append(f"hit rate {one.hit_rate:.1%}, by {one.basis}")
    if one.pace.reading:
        lines.append(f"the disk is busy for {1e3 * one.pace.reading:,.1f} ms of a token")
    return lines


def _range_lines(range_: Range) -> list[str]:
    least, most = range_.least, range_.most
    at = dict(range_.curve)
    return [
        f"smallest memory that works: {size(least.report.total)}, {1e3 * least.pace.total:,.1f} ms a token",
        f"beyond {size(range_.enough)} more does not help: {1e3 * at[range_.enough]:,.1f} ms a token",
        f"all of it in memory: {size(most.report.total)}, {1e3 * most.pace.total:,.1f} ms a token",
    ]
