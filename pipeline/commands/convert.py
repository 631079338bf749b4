"""`convert`: a Hugging Face checkpoint or a GGUF file becomes a store."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipeline import first_dial
from pipeline.commands.options import Bits, Quiet
from pipeline.commands.shadow import make
from pipeline.config import Config
from pipeline.console import say
from pipeline.models import builtin
from pipeline.models.names import find_source
from pipeline.models.stores import convert
from storage.layout import DEFAULT_ALIGNMENT
from storage.predictors import copy_all
from storage.store import Store


def command(
    model: Annotated[
        str,
        typer.Argument(
            help="A preset, a checkpoint's directory, a GGUF file or a Hugging Face id.", metavar="MODEL"
        ),
    ],
    out: Annotated[Path, typer.Argument(help="The store's directory.", metavar="STORE")],
    alignment: Annotated[
        int, typer.Option(help="Every bundle starts at a multiple of this many bytes.")
    ] = DEFAULT_ALIGNMENT,
    order: Annotated[
        Path | None,
        typer.Option(
            help="Which neuron lies where: a file that run.py trace order wrote.", metavar="ORDER.npy"
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="What the numbers of a GGUF file are widened to: float16, bfloat16 or float32.",
            metavar="DTYPE",
        ),
    ] = None,
    bits: Bits = None,
    small: Annotated[
        bool,
        typer.Option(
            "--small",
            help="With --bits 4: attention has four bits, too, and no minima, as in Q4_0: for models whose "
            "attention in eight would fill the memory.",
        ),
    ] = False,
    shadow: Annotated[
        int | None,
        typer.Option(
            help="Also make the store's shadow, in 4 or 8 bits; see run.py shadow.", show_default=False
        ),
    ] = None,
    dial: Annotated[
        bool,
        typer.Option(
            "--dial",
            help="Also make shadow and dial of a model without zeros, as its first use by name does.",
        ),
    ] = False,
    predictors_of: Annotated[
        Path | None,
        typer.Option(
            help="Also copy the predictors of this store, which is of the same checkpoint: those of 16 bits "
            "serve 8 and 4.",
            metavar="STORE",
        ),
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Convert a checkpoint or a GGUF file into a store.

    Checkpoints are those of Hugging Face. An interrupted conversion goes on where it was.
    """
    source, trained = find_source(model), None if predictors_of is None else Store.open(predictors_of)
    convert(
        source.checkpoint(),
        out,
        name=source.name,
        alignment=alignment,
        order=order,
        dtype=dtype,
        bits=bits,
        small=small,
    )
    if source.directory == builtin.CHECKPOINT:
        builtin.install(Store.open(out), None if small else bits)
    if trained is not None:
        copy_all(trained, Store.open(out))
    if shadow is not None:
        make(Store.open(out), shadow)
    if dial and (why := first_dial.make(Store.open(out), Config())):
        say(f"{out} has no dial: {why}")
    say(f"{out} is ready: run.py --model {out}")
