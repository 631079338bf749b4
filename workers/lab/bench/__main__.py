"""`bench`: measures a store against the hardware, and against other packages."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from pipeline import program
from pipeline.commands.options import Bits, ConfigFile, Device, DeviceMemory, Memory, Model, Quality, Settings
from pipeline.config import Values
from pipeline.console import say
from pipeline.models.names import configure
from storage.errors import UsageError
from storage.store import Store

BUDGET = "50%+1GiB"
SECTIONS = ("predictor", "cache", "prefetcher", "compute")  # of a configuration: the rest a bench decides


def main(
    model: Model = "",
    out: Annotated[Path, typer.Option(help="Directory for results.json, results.md and plots.")] = Path(
        "bench-results"
    ),
    memory: Memory = BUDGET,
    device: Device = "",
    device_memory: DeviceMemory = "",
    bits: Bits = None,
    quality: Quality = "",
    parts: Annotated[
        str, typer.Option(help="Which of ablation,curve,disk,roofline; empty: only --peers.", metavar="LIST")
    ] = "ablation,curve,disk,roofline",
    row: Annotated[
        list[str] | None,
        typer.Option(help="Only this row of the ablation; may be repeated.", metavar="NAME"),
    ] = None,
    peers: Annotated[
        str,
        typer.Option(help="Also measure accelerate,airllm,llama.cpp; needs --checkpoint.", metavar="LIST"),
    ] = "",
    peer_python: Annotated[
        list[str] | None, typer.Option(help="A peer's interpreter; may be repeated.", metavar="NAME=PATH")
    ] = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option(
            help="What peers run: the checkpoint that the store is of, or for llama.cpp a GGUF file."
        ),
    ] = None,
    beside: Annotated[
        list[str] | None,
        typer.Option(
            help="Another store of the same tokens, such as the model in fewer bits: its rows take turns, "
            "under the same budget in bytes; may be repeated.",
            metavar="NAME=STORE",
        ),
    ] = None,
    text: Annotated[Path | None, typer.Option(help="Text whose tokens are decoded.", metavar="FILE")] = None,
    prompt_tokens: Annotated[int, typer.Option(help="Tokens of the text that are the prompt.", min=1)] = 128,
    tokens: Annotated[int, typer.Option(help="Tokens decoded after it.", min=2)] = 64,
    repeats: Annotated[int, typer.Option(help="Runs of each row.", min=1)] = 3,
    threads: Annotated[int, typer.Option(help="Threads of compute; 0: the configuration's.", min=0)] = 0,
    strict: Annotated[bool, typer.Option(help="Also a row at 50 % of the checkpoint.")] = True,
    draw: Annotated[bool, typer.Option("--plots/--no-plots", help="PNG files, with matplotlib.")] = True,
    quick: Annotated[
        bool,
        typer.Option("--quick", help="A small model in about a minute: few tokens, one run, few points."),
    ] = False,
    config_file: ConfigFile = None,
    settings: Settings = None,
) -> None:
    """Measure what a token costs, technique by technique, and how close that is to the hardware's limits.

    Writes results.json, results.md and plots. Run it on a machine that does nothing else.
    """
    from workers.lab.bench import bench, job, plots
    from workers.lab.bench import peers as peers_part

    if draw:
        plots.check()
    wanted = _listed(parts, bench.PARTS)
    names = [name for name in peers.split(",") if name]
    interpreters = peers_part.interpreters(names, _pairs("--peer-python", peer_python or ()))
    others = {name: Store.open(path) for name, path in _pairs("--beside", beside or ()).items()}
    if names and checkpoint is None:
        raise UsageError("--peers needs --checkpoint, what the store was converted from")
    if not wanted and not names:
        raise UsageError("nothing to measure: --parts and --peers are both empty")
    if row and "ablation" not in wanted:
        raise UsageError("--row names rows of the ablation, which --parts leaves out")
    if quick and memory != BUDGET:
        raise UsageError("--quick has a budget of its own: leave out --memory, or --quick")
    values: Values = {
        "model": {"bits": bits},
        "predictor": {"quality": quality or None},
        "compute": {"device": device or None, "device_memory": device_memory or None},
    }
    source, config = configure(model, config_file, settings or (), values)
    store = source.open_store()
    threads = threads or config.compute.threads
    # The rings are given the store, so they would not hear of a preset.
    fixed = (f"model.predictor={config.model.predictor}", *config.changes(*SECTIONS))
    if quick:
        prompt_tokens, tokens, repeats, strict = min(prompt_tokens, 16), min(tokens, 12), 1, False
        memory = job.quick_budget(store, fixed, prompt_tokens + tokens, threads)
    with job.make_job(
        store,
        text=text or job.TEXT,
        prompt_tokens=prompt_tokens,
        count=tokens,
        budget=memory,
        repeats=repeats,
        threads=threads,
        quick=quick,
        settings=fixed,
        say=say,
    ) as made:
        bench.measure(
            made,
            out,
            parts=wanted,
            draw=draw,
            only=row or (),
            strict=strict,
            interpreters=interpreters,
            checkpoint=checkpoint,
            beside=others,
            say=say,
        )
    print((out / bench.REPORT).read_text(encoding="utf-8"))
    say(f"written to {out}")


def _listed(text: str, known: tuple[str, ...]) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in known:
            raise UsageError(f"unknown part {name!r}; known are {', '.join(known)}")
    return names


def _pairs(option: str, given: list[str] | tuple[str, ...]) -> dict[str, Path]:
    found = {}
    for one in given:
        name, equals, path = one.partition("=")
        if not equals or not path:
            raise UsageError(f"{option} takes NAME=PATH, not {one!r}")
        found[name] = Path(path)
    return found


def run() -> int:
    """The command line's exit status."""
    return program.single(main)


if __name__ == "__main__":
    sys.exit(run())
