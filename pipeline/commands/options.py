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
        "store. [default: the built-in model]",
        metavar="NAME|DIR",
        show_default=False,
    ),
]
Memory = Annotated[
    str,
    typer.Option(
        help="Budget for everything together: a size (7GiB), a share of the checkpoint (50%), or their sum "
        "(50%+1GiB).",
        metavar="SIZE",
    ),
]
Device = Annotated[
    str,
    typer.Option(
        help="What computes: cpu, or through torch torch-cpu, cuda (NVIDIA) or mps (Metal). "
        "[default: as configured, cpu]",
        metavar="NAME",
        show_default=False,
    ),
]
DeviceMemory = Annotated[
    str,
    typer.Option(
        help="Budget of the device's own memory, in the forms of --memory. [default: nearly all that a GPU "
        "has free]",
        metavar="SIZE",
        show_default=False,
    ),
]
Bits = Annotated[
    int | None,
    typer.Option(
        help="Round the weights to 8 or 4 bits, once, into a store of its own. 16 keeps them, and widens "
        "those of a GGUF file. [default: as the model's files have them]",
        show_default=False,
    ),
]
Context = Annotated[
    int,
    typer.Option(
        "--context", help="Tokens of prompt and answer together. 0: the model's limit, at most 2048.", min=0
    ),
]
ConfigFile = Annotated[
    Path | None,
    typer.Option("--config", help="A TOML file of settings, such as those in configs/.", metavar="FILE"),
]
Quality = Annotated[
    str,
    typer.Option(
        help="How exactly the model is computed: exact, high, balanced, fast or small, each reading less "
        "than the one before; see docs/quality.md. [default: as the model's configuration says]",
        metavar="WORD",
        show_default=False,
        callback=check_word,
    ),
]
Verify = Annotated[
    str,
    typer.Option(
        help="Which reads are compared with their checksums: off, sample (one unit of 16) or always. "
        "[default: as configured, sample]",
        metavar="WORD",
        show_default=False,
        callback=check_verify,
    ),
]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        help="Override one key of the configuration; may be repeated. docs/configuration.md lists them.",
        metavar="SECTION.KEY=VALUE",
    ),
]

ChatTemplateFile = Annotated[
    Path | None,
    typer.Option(help="A chat template (Jinja) instead of the model's own.", metavar="FILE"),
]
Temperature = Annotated[
    float | None,
    typer.Option(
        help="How freely tokens are sampled; 0 always takes the likeliest. [default: the model's own]",
        show_default=False,
    ),
]
TopP = Annotated[
    float | None,
    typer.Option(
        help="Sample from the likeliest tokens that have this probability together. "
        "[default: the model's own]",
        show_default=False,
    ),
]
TopK = Annotated[
    int | None,
    typer.Option(
        help="Sample from this many likeliest tokens; 0: all. [default: the model's own]", show_default=False
    ),
]
JsonSchema = Annotated[
    Path | None,
    typer.Option("--json-schema", help="Hold the answer to the JSON schema in this file.", metavar="FILE"),
]
Seed = Annotated[int, typer.Option(help="Seed of the sampling: an equal seed gives an equal text.")]


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
    bool,
    typer.Option(
        "--verbose",
        "-v",
        help="Say how the memory is divided and what was chosen; at the end, what was planned beside what "
        "came.",
    ),
]


def _writable(file: Path | None) -> Path | None:
    """Refuse before the work what could not be written after it."""
    if file is not None:
        check_writable(file)
    return file


Picture = Annotated[
    Path | None, typer.Option(help="Also draw it into this file, a PNG.", metavar="FILE", callback=_writable)
]
JsonFile = Annotated[
    Path | None,
    typer.Option(help="Also write all of it into this file, as JSON.", metavar="FILE", callback=_writable),
]
TimelineFile = Annotated[
    Path | None,
    typer.Option(
        "--timeline",
        help="Record what every process did and when, for run.py timeline and Perfetto. A name that ends in "
        ".gz compresses it.",
        metavar="FILE",
        callback=_writable,
        show_default=False,
    ),
]
