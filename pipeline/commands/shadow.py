"""`shadow`: the low-bit copy of a store's FFNs that serves the neurons which are not read."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipeline.commands.options import Quiet
from pipeline.console import say, size
from pipeline.models.names import find_source
from storage import shadow
from storage.store import Store


def command(
    model: Annotated[
        str, typer.Argument(help="A store's directory, or whatever else --model takes.", metavar="STORE")
    ],
    bits: Annotated[int, typer.Option(help="Bits of a weight in the copy: 4 or 8.")] = 4,
    quiet: Quiet = False,
) -> None:
    """Make a store's shadow, a copy of its FFNs in few bits.

    --quality high, balanced, fast and small need it.
    """
    make(find_source(model).open_store(), bits)


def make(store: Store, bits: int) -> Path:
    """With a progress bar; returns the file. Raises UsageError for a store that cannot have one."""
    from pipeline.progress import Progress

    with Progress(f"making the shadow of {store.manifest.name}") as progress:
        path = shadow.write(store, bits, lambda done, total: progress("rounding", done, total))
    held = size(shadow.Shadow.open(store).bytes)
    say(f"{path} is ready: --quality high, balanced, fast and small hold its {held} in memory")
    return path
