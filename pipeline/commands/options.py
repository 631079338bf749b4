"""Options that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipeline.directories import check_writable

Model = Annotated[
    str,
    typer.Option(
        help="A preset of configs/, a Hugging Face id, or the directory of a checkpoint or store. "
        "Without it: the built-in model.",
        metavar="NAME|DIR",
        show_default=False,
    ),
]
Memory = Annotated[
    str,
    typer.Option(help="Budget for everything: 7GiB, or 50% of the checkpoint.", metavar="SIZE"),
]
Context = Annotated[
    int, typer.Option("--context", help="Tokens of KV cache; 0: 2048 or the model's limit.", min=0)
]
ConfigFile = Annotated[
    Path | None, typer.Option("--config", help="A TOML file as in configs/.", metavar="FILE")
]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set", help="Override one configuration key; may be repeated.", metavar="SECTION.KEY=VALUE"
    ),
]


def _writable(file: Path | None) -> Path | None:
    """Refuse before the work what could not be written after it."""
    if file is not None:
        check_writable(file)
    return file


Picture = Annotated[Path | None, typer.Option(help="Write a PNG.", metavar="FILE", callback=_writable)]
JsonFile = Annotated[
    Path | None, typer.Option(help="Write everything there too.", metavar="FILE", callback=_writable)
]
