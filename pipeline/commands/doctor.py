"""`doctor`: what this machine offers and lacks, with what follows and what helps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from pipeline import directories
from pipeline.console import tables, write, write_json
from pipeline.doctor import abilities, system
from pipeline.doctor.finding import Finding
from pipeline.ending import FAILED
from storage.errors import UsageError

MARKS = {"fine": "ok", "less": "less", "broken": "BROKEN", "told": "-"}
STYLES = {"fine": "green", "less": "yellow", "broken": "bold red", "told": "dim"}


def command(
    report: Annotated[
        bool, typer.Option("--report", help="Plain text for a bug report, without private paths.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object instead of a table.")
    ] = False,
    measure: Annotated[
        bool, typer.Option("--measure", help="Also measure the disk, where that was not done yet.")
    ] = False,
) -> None:
    """Tell what this machine offers and lacks, and what helps.

    The exit status is 0 where flashring can run, however slowly, and 1 where it cannot.
    """
    if report and as_json:
        raise UsageError("--report and --json are two forms of the same: give one")
    found = examine(measure=measure)
    runs = all(one.state != "broken" for one in found)
    if as_json:
        write_json({"runs": runs, "findings": [one.to_json() for one in found]})
    elif report:
        write(shortened(plain(found)))
    else:
        _print(found, runs=runs)
    if not runs:
        raise typer.Exit(FAILED)


def examine(*, measure: bool) -> list[Finding]:
    """Everything, in the order in which it is shown."""
    home = directories.home()
    there = next(one for one in (home, *home.absolute().parents) if one.is_dir())
    return [*system.findings(), *abilities.findings(abilities.ask(there)), *system.places(measure=measure)]


def plain(found: Sequence[Finding]) -> str:
    """Text without colours and frames."""
    lines = []
    for one in found:
        lines.append(f"{MARKS[one.state]:<7} {one.name}: {one.found}")
        lines += [f"        {line}" for line in (one.consequence, one.remedy) if line]
    return "\n".join(lines) + "\n"


def shortened(text: str) -> str:
    """Without the name of whose home it is."""
    for home in {str(Path.home()), str(Path.home().resolve())}:
        if len(home) > 1:
            text = text.replace(home, "~")
    return text


def _print(found: Sequence[Finding], *, runs: bool) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(show_lines=False)
    for heading in ("", "what", "found", "what follows, and what helps"):
        table.add_column(heading)
    for one in found:
        table.add_row(
            Text(MARKS[one.state], STYLES[one.state]),
            one.name,
            Text(one.found),
            Text("\n".join(line for line in (one.consequence, one.remedy) if line)),
        )
    console = tables()
    console.print(table)
    lacking = sum(one.state == "less" for one in found)
    verdict = f"flashring runs here{f', with {lacking} things less than it could have' if lacking else ''}"
    console.print(verdict if runs else "flashring does not run here yet", highlight=False)
