"""Options that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipeline.config import check_verify
from pipeline.console import be_quiet
from pipeline.directories import check_writable
from pipeline.quality import check_word

Model = Annotated[
    str,
    typer.Option(
        help="A preset of configs/, a Hugging Face id, a GGUF file, or the directory of a checkpoint or "
        "store. Without it: the built-in model.",
        metavar="NAME|DIR",
        show_default=False,
    ),
]
Memory = Annotated[
    str,
    typer.Option(help="Budget for everything: 7GiB, or 50% of the checkpoint.", metavar="SIZE"),
]
Device = Annotated[
    str,
    typer.Option(
        help="What computes: cpu; or by torch torch-cpu, cuda (NVIDIA), mps (Metal). "
        "[default: the configuration's, cpu]",
        metavar="NAME",
        show_default=False,
    ),
]
DeviceMemory = Annotated[
    str,
    typer.Option(
        help="Budget of the device's memory: 7GiB, or 50% of the checkpoint. [default: nearly all that a GPU "
        "has free]",
        metavar="SIZE",
        show_default=False,
    ),
]
Bits = Annotated[
    int | None,
    typer.Option(
        help="8 or 4: weights are rounded to so many bits, once. 16: they are not, and those of a GGUF file "
        "are widened. [default: as the model's files have them]",
        show_default=False,
    ),
]
Context = Annotated[
    int, typer.Option("--context", help="Tokens of KV cache; 0: 2048 or the model's limit.", min=0)
]
ConfigFile = Annotated[
    Path | None, typer.Option("--config", help="A TOML file as in configs/.", metavar="FILE")
]
Quality = Annotated[
    str,
    typer.Option(
        help="exact, high, balanced, fast or small: the weights as they are, or less for a lower price; see "
        "docs/quality.md. [default: as the model's configuration says]",
        metavar="WORD",
        show_default=False,
        callback=check_word,
    ),
]
Verify = Annotated[
    str,
    typer.Option(
        help="Compare what is read with its checksums: off, sample (one unit of 16) or always. [default: the "
        "configuration's, sample]",
        metavar="WORD",
        show_default=False,
        callback=check_verify,
    ),
]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set", help="Override one configuration key; may be repeated.", metavar="SECTION.KEY=VALUE"
    ),
]

ChatTemplateFile = Annotated[
    Path | None,
    typer.Option(help="A chat template (Jinja) instead of the model's own.", metavar="FILE"),
]
Temperature = Annotated[
    float | None, typer.Option(help="0 always takes the likeliest token.", show_default=False)
]
TopP = Annotated[
    float | None, typer.Option(help="Sample from the likeliest tokens of this mass.", show_default=False)
]
TopK = Annotated[int | None, typer.Option(help="Sample from this many tokens; 0: all.", show_default=False)]
JsonSchema = Annotated[
    Path | None,
    typer.Option("--json-schema", help="An answer is JSON of the schema in this file.", metavar="FILE"),
]
Seed = Annotated[int, typer.Option(help="Seed of the sampling.")]


def _be_quiet(asked: bool) -> bool:
    if asked:
        be_quiet()
    return asked


Quiet = Annotated[
    bool,
    typer.Option("--quiet", "-q", help="Write nothing but the text and errors.", callback=_be_quiet),
]
Watch = Annotated[
    bool,
    typer.Option(
        "--watch", help="Show the ring at work on standard error: workers, reads, hits by layer, memory."
    ),
]
Verbose = Annotated[
    bool, typer.Option("--verbose", "-v", help="Say how memory is divided and what was chosen.")
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
TimelineFile = Annotated[
    Path | None,
    typer.Option(
        "--timeline",
        help="Write what every process did and when, for Perfetto and run.py timeline; .gz compresses it.",
        metavar="FILE",
        callback=_writable,
        show_default=False,
    ),
]
