"""`verify`: reads a whole store again and compares it with its checksums."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipeline.commands.options import Quiet
from pipeline.console import say


def command(
    store: Annotated[Path, typer.Argument(help="The store's directory.", metavar="STORE")],
    quiet: Quiet = False,
) -> None:
    """Compare every byte of a store with its checksums."""
    from pipeline.progress import Progress
    from storage.verify import verify

    with Progress(f"verifying {store.absolute().name}") as progress:
        verify(store, progress)
    say(f"{store} is intact")
