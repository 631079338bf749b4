"""`stores`: the converted stores of this user, listed; one that is no longer wanted removed."""

from __future__ import annotations

from typing import Annotated

import typer

from pipeline import program
from pipeline.console import say, size, write, write_json
from pipeline.models import shelf
from storage.errors import UsageError

HEADINGS = ("model", "bits", "size", "last used", "path")

app = program.make()


@app.callback(invoke_without_command=True)
def listed(
    context: typer.Context,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON array instead of a table.")] = False,
) -> None:
    """List the converted stores, or remove one."""
    if context.invoked_subcommand is not None:
        return
    found = shelf.kept()
    if as_json:
        write_json([one.to_json() for one in found])
        return
    if not found:
        say(f"there are no converted stores in {shelf.shelf()}")
        return
    rows = [HEADINGS, *map(_cells, found)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:  # the path last, where nothing cuts it
        write("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() + "\n")
    say(f"together {size(sum(one.bytes for one in found))}")


def _cells(one: shelf.Kept) -> tuple[str, ...]:
    model = one.model if one.state == "whole" else f"{one.model} ({one.state})".lstrip()
    return model, one.bits, size(one.bytes), f"{one.last_used:%Y-%m-%d %H:%M}", str(one.path)


@app.command()
def remove(
    name: Annotated[str, typer.Argument(help="The store's directory, or its name.", metavar="STORE")],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Remove one store.

    Its model is converted again when it is next used.
    """
    store = shelf.find(name)
    if not yes and not _confirmed(store):
        raise UsageError(f"{store.path.name} stays")
    shelf.remove(store)
    say(f"removed {store.path}, {size(store.bytes)}")


def _confirmed(store: shelf.Kept) -> bool:
    try:
        return typer.confirm(_question(store), err=True)
    except typer.Abort as abort:  # typer makes it of Ctrl-C, and of an input that has ended
        if not isinstance(abort.__context__, EOFError):
            raise
        say("")  # behind the question
        raise UsageError(f"{store.path.name} stays: nobody answered, and --yes does not ask") from None


def _question(store: shelf.Kept) -> str:
    trained = f" with {store.predictors} trained predictor files" if store.predictors else ""
    return f"Remove {store.path}, {size(store.bytes)}{trained}?"
