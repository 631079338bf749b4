"""`synthesize`: write a synthetic checkpoint, or a mixture's store; `measure DIR`: a model's activity, or its
routing; `gguf DIR FILE`: as GGUF.
"""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from pipeline import program
from pipeline.commands.options import JsonFile
from pipeline.console import say
from pipeline.cores import thread_count
from pipeline.progress import Progress
from storage import shadow as shadows
from storage.convert.recipe import Recipe
from storage.errors import UsageError, reason
from storage.manifest import MANIFEST
from storage.store import Store
from workers.lab.synthesis import as_gguf
from workers.lab.synthesis import measure as measuring
from workers.lab.synthesis.checkpoint import Request, synthesize
from workers.lab.synthesis.direct import write_store
from workers.lab.synthesis.mixture import as_gguf as mixture_as_gguf
from workers.lab.synthesis.mixture import routing, routing_table
from workers.lab.synthesis.mixture.create import MixtureRequest, create_checkpoint
from workers.lab.synthesis.mixture.create import create as create_mixture
from workers.lab.synthesis.planting import RATES
from workers.lab.synthesis.shapes import MIXTURES, SHAPES, find_shape
from workers.lab.synthesis.sources import StoreWeights, Weights, open_weights
from workers.lab.synthesis.table import print_table

app = program.make()


@app.callback(invoke_without_command=True)
def create(
    context: typer.Context,
    shape: Annotated[str, typer.Option(help=f"One of {', '.join(SHAPES)}.", metavar="NAME")] = "",
    out: Annotated[Path | None, typer.Option(help="The checkpoint's directory, made.", metavar="DIR")] = None,
    layers: Annotated[int, typer.Option(help="Only the first N layers.", metavar="N", min=0)] = 0,
    seed: Annotated[int, typer.Option(help="Equal seeds give equal weights.", metavar="N", min=0)] = 0,
    rate: Annotated[
        float,
        typer.Option(help=f"New neurons per token: {', '.join(f'{r:g}' for r in RATES)} × the paper's."),
    ] = 1.0,
    tokenizer: Annotated[
        Path | None, typer.Option(help="Directory with a tokenizer.json to copy.", metavar="DIR")
    ] = None,
    activation: Annotated[
        str,
        typer.Option(help="relu (sparse), gelu or silu (not sparse); without it, the shape's own."),
    ] = "",
    bits: Annotated[
        int | None,
        typer.Option(
            help="16, 8 or 4: straight into a store of so many bits, without a checkpoint. Of a mixture's "
            "experts, which are always in a store: 8 or 4, without it 4.",
            metavar="N",
        ),
    ] = None,
    small: Annotated[
        bool,
        typer.Option(
            "--small",
            help="With --bits 4: attention has four bits, too, and no minima, as in Q4_0.",
        ),
    ] = False,
    shadow: Annotated[
        int | None,
        typer.Option(
            help="With --bits 16: also the store's shadow, in 4 or 8 bits; see run.py shadow.",
            metavar="N",
            show_default=False,
        ),
    ] = None,
    no_locality: Annotated[
        bool, typer.Option("--no-locality", help="A mixture's experts follow the token alone.")
    ] = False,
    checkpoint: Annotated[
        bool,
        typer.Option(
            "--checkpoint", help="A mixture as a checkpoint, in float16, of the numbers that its store has."
        ),
    ] = False,
    threads: Annotated[int, typer.Option(help="Threads; 0: one for each CPU.", metavar="N", min=0)] = 0,
) -> None:
    """Write a SYNTHETIC model of a published shape.

    It is a Hugging Face checkpoint; with --bits, and of a mixture of experts always, a store. With
    ReLU its activity is planted: sparse, local and predictable about as the paper says; and so is a mixture's
    routing. It is for measuring speed; its text means nothing.
    """
    if context.invoked_subcommand is not None:
        return
    if not shape or out is None:
        raise UsageError(f"--shape and --out are needed; see {context.command_path} --help")
    _use_threads(threads)
    if tokenizer is None:
        say(
            f"without --tokenizer, {out} will have none: run.py can give it no text, neither to continue nor "
            "in serve, bench and evaluate"
        )
    if find_shape(shape).mixture:
        if activation or small or shadow is not None:
            raise UsageError("--activation, --small and --shadow are for models without experts")
        bits = 4 if bits is None else bits
        request = MixtureRequest(find_shape(shape), layers, seed, rate, not no_locality, bits, tokenizer)
        _mixture(request, out, checkpoint)
        return
    if checkpoint:
        raise UsageError(
            f"--checkpoint is for mixtures ({', '.join(MIXTURES)}); without --bits others are one"
        )
    if no_locality:
        raise UsageError(f"--no-locality is for mixtures: {', '.join(MIXTURES)}")
    if shadow is not None and bits != 16:
        raise UsageError("--shadow is for --bits 16")
    dense = Request(find_shape(shape), layers, seed, rate, activation, tokenizer)
    if bits is not None or small:
        recipe = Recipe.of(bits, small)
        with Progress(f"synthesising {shape}") as progress:
            store = write_store(dense, recipe, out, progress)
            if shadow is not None:
                shadows.write(store, shadow, lambda done, total: progress("shadow", done, total))
        say(f"{out} is a synthetic store of the shape {shape}, seed {seed}, rate {rate:g}")
        return
    with Progress(f"synthesising {shape}") as progress, torch.no_grad():
        synthesize(dense, out, lambda done, total: progress("weights", done, total))
    say(f"{out} is a synthetic checkpoint of the shape {shape}, seed {seed}, rate {rate:g}")


def _mixture(request: MixtureRequest, out: Path, checkpoint: bool) -> None:
    name, kind = request.shape.name, "checkpoint" if checkpoint else "store"
    with Progress(f"synthesising {name}") as progress:
        if checkpoint:
            create_checkpoint(request, out, lambda done, total: progress("weights", done, total))
        else:
            create_mixture(request, out, progress)
    routing = f"rate {request.rate:g}" if request.locality else "no locality"
    say(f"{out} is a synthetic {kind} of the shape {name}, seed {request.seed}, {routing}")


@app.command("measure")
def measure(
    model: Annotated[Path, typer.Argument(help="A checkpoint's or a store's directory.", metavar="DIR")],
    text: Annotated[Path, typer.Option(help="A text to run through the model.", metavar="FILE")],
    tokenizer: Annotated[
        Path | None, typer.Option(help="Directory with tokenizer.json; default: the model's.", metavar="DIR")
    ] = None,
    tokens: Annotated[int, typer.Option(help="Tokens of the text that are used.", min=32)] = 256,
    rank: Annotated[int, typer.Option(help="Rank of the SVD predictor; 0: d_model / 32.", min=0)] = 0,
    layers: Annotated[int, typer.Option(help="Of a mixture, only the first N; 0: all.", min=0)] = 0,
    json: JsonFile = None,
    threads: Annotated[int, typer.Option(help="Threads; 0: one for each CPU.", metavar="N", min=0)] = 0,
) -> None:
    """Measure a model's FFN activity on a text, or a mixture's routing, beside published figures."""
    _use_threads(threads)
    weights = open_weights(model)
    if isinstance(weights, StoreWeights) and weights.architecture.mixture:
        _measure_routing(weights, text, tokenizer or model, tokens, layers, json)
        return
    ids = _tokens(text, tokenizer or model, tokens, weights)
    rank = min(rank or max(8, weights.architecture.d_model // 32), weights.architecture.d_model)
    layers = len(weights.architecture.layers)
    with Progress(f"measuring {model.name}", "layers") as progress:
        reports = measuring.measure(weights, ids, rank, lambda done: progress("activity", done, layers))
    summary = measuring.summary(reports)
    print_table(weights, len(ids), rank, reports, summary)
    if json is not None:
        measuring.write_json(json, _document(weights, text, len(ids), rank, reports, summary))
        say(f"written to {json}")


def _measure_routing(
    weights: StoreWeights, text: Path, tokenizer: Path, tokens: int, layers: int, json: Path | None
) -> None:
    store, count = weights.store, layers or len(weights.architecture.layers)
    ids = _tokens(text, tokenizer, tokens, weights)
    with Progress(f"measuring {weights.name}", "layers") as progress:
        reports = routing.measure(store, ids, count, lambda done: progress("routing", done, count))
    routing_table.print_table(weights, len(ids), reports)
    if json is not None:
        document = {
            "synthetic": weights.synthetic,
            "model": weights.name,
            "text": text.name,
            "tokens": len(ids),
            "summary": routing.summary(reports),
            "published": routing.PUBLISHED.get(weights.architecture.family, {}),
            "layers": [asdict(report) for report in reports],
        }
        measuring.write_json(json, document)
        say(f"written to {json}")


@app.command("gguf")
def write_gguf(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint, or a mixture's store.", metavar="DIR")],
    out: Annotated[Path, typer.Argument(help="The file to write.", metavar="FILE.gguf")],
    kind: Annotated[
        str, typer.Option("--type", help=f"Of all matrices: {', '.join(as_gguf.TYPES)}.", metavar="TYPE")
    ] = "",
) -> None:
    """Write a checkpoint, or a mixture's store, as a GGUF file, for programs that read those."""
    with Progress(f"writing {out.name}") as progress:
        if (checkpoint / MANIFEST).is_file():
            if kind:
                raise UsageError("--type is for checkpoints: a store's codes are written as they are")
            mixture_as_gguf.write(
                Store.open(checkpoint), out, lambda done, total: progress("weights", done, total)
            )
        else:
            kind = kind or "Q8_0"
            as_gguf.write(checkpoint, out, kind, lambda done, total: progress("weights", done, total))
    say(f"{out} holds {checkpoint} in {kind or 'its own bits'}")


def _use_threads(count: int) -> None:
    if count:
        torch.set_num_threads(thread_count(count))


def _tokens(text: Path, tokenizer: Path, count: int, weights: Weights) -> list[int]:
    """The first `count` tokens of the text. Raises UsageError for a file that is no use."""
    from tokenizers import Tokenizer

    path = tokenizer / "tokenizer.json" if tokenizer.is_dir() else tokenizer
    if not path.is_file():
        raise UsageError(f"there is no {path}: name a directory that has one with --tokenizer")
    try:
        written = text.read_text(encoding="utf-8")[: 40 * count]
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"the text {text} cannot be read: {reason(error)}") from error
    ids = list(Tokenizer.from_file(str(path)).encode(written).ids)[:count]
    ids = ids[: weights.architecture.max_positions]
    if len(ids) < 32 or max(ids) >= weights.architecture.vocabulary:
        raise UsageError(f"{text} has fewer than 32 tokens, or tokens that {weights.name} does not know")
    return ids


def _document(
    weights: Weights,
    text: Path,
    tokens: int,
    rank: int,
    reports: list[measuring.LayerReport],
    summary: dict[str, Any],
) -> dict[str, Any]:
    return {
        "synthetic": weights.synthetic,
        "model": weights.name,
        "architecture": weights.architecture.to_json(),
        "text": text.name,
        "tokens": tokens,
        "rank": rank,
        "windows": list(measuring.WINDOWS),
        "window": measuring.WINDOW,
        "summary": summary,
        "paper": measuring.PAPER.get(weights.architecture.family, {}),
        "layers": [asdict(report) for report in reports],
    }


def run() -> int:
    """The command line's exit status."""
    return program.run(app)


if __name__ == "__main__":
    sys.exit(run())
