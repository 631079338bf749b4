"""Make predictors: `python -m workers.lab.training --store DIR --text FILE`.

Three stages: the text's activations to disk (`activations.py`), one map per layer and look-ahead
(`fit.py`, `svd.py`), the report and the file (`report.py`, `lowmap.py`). A run that was stopped
continues: activations and finished maps stay in the work directory until the file is written.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import numpy as np
import numpy.typing as npt
import torch
import typer

from pipeline import program
from pipeline.config import Predictor
from pipeline.console import say, tables
from pipeline.cores import thread_count
from pipeline.directories import check_writable
from pipeline.progress import Progress
from pipeline.status import waiting
from storage.errors import UsageError
from storage.lock import locked
from storage.store import Store
from storage.tensors import Tensors
from workers.lab.training import activations, fit, report, texts
from workers.lab.training.activations import Activations
from workers.lab.training.job import Fitting, Split, TrainingJob, regression
from workers.lab.training.lowmap import LowMap, write
from workers.predictor.lowrank import AHEAD, OWN

FORMAT = "4"  # of the work directory's maps: raise it when the same options would make other maps


def make(
    store: Store,
    tokens: npt.NDArray[np.int64],
    split: Split,
    job: TrainingJob,
    name: str,
    work: Path,
    threads: int = 1,
    told: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> list[report.LayerReport]:
    """Make `STORE/predictors/NAME.safetensors`; returns what it reports.

    `tokens` `[rows, length]`, cut by `split`. The same arguments give the same bytes, on the same
    machine. Raises UnsupportedModel for a model without ReLU.
    """
    _check(store, job)
    torch.set_num_threads(threads)
    recorded = activations.record(
        store,
        tokens,
        work / "activations",
        threads,
        lambda done, total: told("activations", done, total),
        job.early,
    )
    wanted = job.maps(len(store.layout.layers))
    ranks = _ranks(store, recorded, split, job)
    key = _key(store, tokens, split, job)
    paths = [
        work / "maps" / f"{key}-{prefix}-{layer}-{rank}.safetensors"
        for (prefix, layer, _), rank in zip(wanted, ranks, strict=True)
    ]
    missing = [index for index, path in enumerate(paths) if not path.exists()]
    fitting = Fitting(store, recorded, split, job)
    # A layer's maps one after the other: they may share work.
    for done, index in enumerate(sorted(missing, key=lambda index: wanted[index][1])):
        told("predictors", len(wanted) - len(missing) + done, len(wanted))
        _, layer, ahead = wanted[index]
        write(paths[index], fitting.fit(layer, ahead, ranks[index]).tensors("map"), {})
    tensors: dict[str, torch.Tensor] = {}
    reports = []
    for (prefix, layer, ahead), rank, path in zip(wanted, ranks, paths, strict=True):
        found = LowMap.read(Tensors(path), "map")
        tensors |= found.tensors(f"{prefix}.{layer}")
        held_out = recorded.samples(layer, ahead).part(split.validation, split.held_out)
        reports.append(report.LayerReport.of(layer, ahead, rank, fit.quality(found, held_out)))
    told("predictors", len(wanted), len(wanted))
    _share(tensors, len(store.layout.layers))
    write(store.predictors(name), tensors, _metadata(store, split, job, reports))
    return reports


def _check(store: Store, job: TrainingJob) -> None:
    """Raises UnsupportedModel for a model without ReLU, UsageError for a method that cannot learn it."""
    activations.require_relu(store)
    if job.method == "svd" and any(len(layer.ffn.deciding) > 1 for layer in store.architecture.layers):
        raise UsageError(
            f"{store.manifest.name} has neurons that two projections decide (dReLU), of which --method svd "
            "knows one: choose trained or regression"
        )


def _share(tensors: dict[str, torch.Tensor], layers: int) -> None:
    """Leave out a map's matrices where they are the in-layer one's, as with `svd`: half of the memory."""
    for layer in range(layers):
        pairs = [(f"{AHEAD}.{layer}.{name}", f"{OWN}.{layer}.{name}") for name in ("down", "up")]
        if all(own in tensors and torch.equal(tensors[ahead], tensors[own]) for ahead, own in pairs):
            for ahead, _ in pairs:
                del tensors[ahead]


def _ranks(store: Store, recorded: Activations, split: Split, job: TrainingJob) -> list[int]:
    """Of every map, in the order of `TrainingJob.maps`."""
    d_model, neurons = store.architecture.d_model, store.layout.most_units
    wanted = job.maps(len(store.layout.layers))
    if job.rank is not None:
        return [min(job.rank, d_model)] * len(wanted)
    ffn_bytes = store.layout.useful_bytes
    fixed = len(wanted) * (neurons * 4 + 4)
    total = int(job.budget * ffn_bytes - fixed) // (2 * (d_model + neurons))
    if total < len(wanted) * fit.RANK_STEP:
        least = (fixed + len(wanted) * fit.RANK_STEP * 2 * (d_model + neurons)) / ffn_bytes
        raise UsageError(f"--budget {job.budget} is too little for this model: it needs {least:.3f} at least")
    strengths = [regression(store, recorded, split, *one[1:]).strengths for one in wanted]
    return fit.allot(strengths, total)


def _key(store: Store, tokens: npt.NDArray[np.int64], split: Split, job: TrainingJob) -> str:
    """Names everything, but rank and layer, that decides a map."""
    what = {
        "format": FORMAT,
        "store": store.identity,
        "split": asdict(split),
        "tokens": hashlib.sha256(np.ascontiguousarray(tokens).tobytes()).hexdigest(),
        "lookahead": job.lookahead,
        "method": job.method,
        "early": job.early,
        "recipe": asdict(job.recipe),
    }
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]


def _metadata(
    store: Store, split: Split, job: TrainingJob, reports: list[report.LayerReport]
) -> dict[str, str]:
    made_from = {
        "method": job.method,
        "tokens": {
            "train": split.train,
            "validation": split.validation - split.train,
            "held_out": split.held_out - split.validation,
        },
        "recipe": asdict(job.recipe),
    }
    return {
        "kind": "lowrank",
        "lookahead": str(job.lookahead),
        "early": json.dumps(job.early),
        "store": store.identity,
        "report": json.dumps(report.to_json(reports, **made_from)),
    }


def main(
    store_path: Annotated[Path, typer.Option("--store", help="The converted model's directory.")],
    text: Annotated[Path, typer.Option(help='Text, or .jsonl with "text"; may be .xz.')],
    held_out: Annotated[
        Path | None, typer.Option(help="Text for the report; without: the last twentieth of TEXT.")
    ] = None,
    lookahead: Annotated[int, typer.Option(help="Layers that predictions run ahead.")] = 1,
    inlayer: Annotated[
        bool, typer.Option(help="Also make maps for look-ahead 0, which refine needs.")
    ] = True,
    rank: Annotated[
        str,
        typer.Option(help="Rank of every map; auto: as --budget allows, higher where the recall needs it."),
    ] = "auto",
    budget: Annotated[
        float,
        typer.Option(help="Largest share of the FFN's bytes that the predictors may take, with --rank auto."),
    ] = 0.08,
    method: Annotated[str, typer.Option(help="trained, regression (no training) or svd.")] = "trained",
    name: Annotated[str, typer.Option(help="The predictors' name in the store.")] = "default",
    tokens: Annotated[int, typer.Option(help="Most tokens of TEXT to use.", min=1)] = 200_000,
    epochs: Annotated[float, typer.Option(help="Passes over the activations.", min=0)] = 1.0,
    false_negatives: Annotated[
        float, typer.Option(help="Share of active neurons that the calibrated threshold may miss.")
    ] = 0.05,
    early: Annotated[
        bool,
        typer.Option("--early", help="Predict before a layer's attention, so that reads overlap with it."),
    ] = False,
    guesses_miss: Annotated[
        float,
        typer.Option(help="Share of active neurons that an early guess may miss when refine corrects it."),
    ] = 0.2,
    resident_miss: Annotated[
        float, typer.Option(help="Share of active resident neurons that predictor.cache_aware may miss.")
    ] = 0.03,
    absent_miss: Annotated[
        float, typer.Option(help="Share of active neurons not in memory that predictor.cache_aware may miss.")
    ] = 0.1,
    seed: Annotated[int, typer.Option(help="Seed of the order of samples.", min=0)] = 0,
    threads: Annotated[int, typer.Option(help="Threads; 0: one for each CPU.", min=0)] = 0,
    work: Annotated[
        Path | None,
        typer.Option(help="Directory for activations; without: beside the store, removed at the end."),
    ] = None,
) -> None:
    """Train the predictors of a converted ReLU model on a text."""
    if not rank.isdecimal() and rank != "auto":
        raise UsageError(f"--rank is a number or auto, not {rank!r}")
    if not math.isfinite(epochs):
        raise UsageError(f"--epochs is a number of passes, not {epochs}")
    recipe = fit.MapRecipe(
        epochs=epochs,
        false_negatives=false_negatives,
        guesses_miss=guesses_miss,
        resident_miss=resident_miss,
        absent_miss=absent_miss,
        seed=seed,
    )
    job = TrainingJob(
        lookahead, inlayer, None if rank == "auto" else int(rank), budget, method, early, recipe
    )
    store = Store.open(store_path)
    target = store.predictors(name)
    check_writable(target if target.parent.is_dir() else target.parent)
    _check(store, job)
    with waiting(f"reading {text.name}"):
        rows, more = texts.two(text, held_out, store, tokens)
    split = Split.of(len(rows), len(more), rows.shape[1])
    place = work or store.path.with_name(f"{store.path.name}.training-{name}")
    place.mkdir(parents=True, exist_ok=True)
    with locked(place, "training"), Progress(f"training {name}", "maps or layers") as progress:
        reports = make(
            store,
            np.concatenate([rows, more]),
            split,
            job,
            name,
            place,
            thread_count(threads),
            progress,
        )
        if work is None:
            shutil.rmtree(place)
    tables().print(report.table(reports))
    settings = [f"model.predictor={name}"] if name != "default" else []
    settings += [f"predictor.lookahead={lookahead}"] if lookahead != Predictor().lookahead else []
    say(
        f"saved {store.predictors(name)}; to use them: run.py "
        + " ".join(["--model", str(store.path), *(f"--set {one}" for one in settings)])
    )


def run() -> int:
    """The command line's exit status."""
    return program.single(main)


if __name__ == "__main__":
    sys.exit(run())
