"""The training curve as a picture: `python -m storage.builtin.plot --run DIR --out FILE.png`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer


def read_log(path: Path) -> list[dict[str, Any]]:
    """Records of a training log, one a step; a step repeated after a resume counts once, the last."""
    records = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        records[record["step"]] = record
    return [records[step] for step in sorted(records)]


def main(
    run: Annotated[Path, typer.Option(help="The --out directory of a training run.")],
    out: Annotated[Path, typer.Option(help="The picture to write.")],
) -> None:
    """Draw training and validation loss, and the active share of every layer."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    records = read_log(run / "log.jsonl")
    recipe = json.loads((run / "recipe.json").read_text(encoding="utf-8"))
    steps = [record["step"] for record in records]
    checked = [record for record in records if "valid" in record]
    figure, (losses, shares) = pyplot.subplots(2, 1, figsize=(8, 7), sharex=True, layout="constrained")
    losses.plot(steps, [record["loss"] for record in records], lw=0.5, alpha=0.5, label="training mix")
    losses.plot(
        [record["step"] for record in checked],
        [record["valid"] for record in checked],
        marker="o",
        ms=3,
        label="held-out TinyStories",
    )
    losses.set_ylabel("nats a token")
    losses.set_ylim(top=6)
    losses.legend()
    for layer in range(len(records[0]["shares"])):
        percent = [100 * record["shares"][layer] for record in records]
        shares.plot(steps, percent, lw=0.7, label=f"layer {layer}")
    shares.set_yscale("log")
    shares.set_ylabel("active FFN neurons, %")
    shares.set_xlabel("step (10,240 tokens)")
    shares.legend(ncol=4, fontsize=8)
    for axes in (losses, shares):
        axes.axvline(recipe["stable_steps"], color="grey", lw=0.8, ls="--")
        axes.grid(alpha=0.3)
    figure.savefig(out, dpi=110)


if __name__ == "__main__":
    typer.run(main)
