"""`repair`: what is damaged in a store is written anew, from the checkpoint that it was converted from."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipeline.console import say
from storage import texts
from storage.errors import UsageError


def command(
    store: Annotated[Path, typer.Argument(help="The store's directory.", metavar="STORE")],
    checkpoint: Annotated[
        str,
        typer.Option(
            "--from",
            help="What it was converted from: a preset, a checkpoint's directory, a GGUF file or a Hugging "
            "Face id. [default: what the store remembers, if it was made on first use]",
            metavar="CHECKPOINT",
            show_default=False,
        ),
    ] = "",
) -> None:
    """Write what is damaged in a store anew.

    It comes from the store's checkpoint. What is intact is not touched.
    """
    from pipeline.models import builtin
    from pipeline.models.names import find_source
    from pipeline.progress import Progress
    from storage.repair import repair
    from storage.store import Store

    given = checkpoint or texts.recorded(store).get("checkpoint", "")
    if not given:
        raise UsageError(f"say which checkpoint {store} was converted from: --from CHECKPOINT")
    source = find_source(given)
    with Progress(f"repairing {store.absolute().name}") as progress:
        mended = repair(store, source.checkpoint(), progress)
    if source.directory == builtin.CHECKPOINT:
        builtin.install(Store.open(store), None)
    if not mended:
        say(f"{store} is intact: nothing was written")
        return
    units = f"{len(mended.units)} unit{'s' if len(mended.units) != 1 else ''} of bundles.bin"
    said = [*([units] if mended.units else []), *mended.files]
    say(f"{store} is mended: {', '.join(said)} written anew")
