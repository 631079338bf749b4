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
    """Draw training and validation loss, and the active share of every layer where it was steered."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    records = read_log(run / "log.jsonl")
    recipe = json.loads((run / "recipe.json").read_text(encoding="utf-8"))
    pictures = [draw_losses, draw_shares] if records[0]["shares"] else [draw_losses]
    figure, grid = pyplot.subplots(
        len(pictures), figsize=(8, 3.5 * len(pictures)), sharex=True, layout="constrained", squeeze=False
    )
    for draw, axes in zip(pictures, grid[:, 0], strict=True):
        draw(axes, records)
        axes.axvline(recipe["stable_steps"], color="grey", lw=0.8, ls="--")
        axes.grid(alpha=0.3)
    grid[-1, 0].set_xlabel("step (10,240 tokens)")
    figure.savefig(out, dpi=110)


def draw_losses(axes: Any, records: list[dict[str, Any]]) -> None:
    checked = [record for record in records if "valid" in record]
    axes.plot(
        [record["step"] for record in records],
        [record["loss"] for record in records],
        lw=0.5,
        alpha=0.5,
        label="training mix",
    )
    axes.plot(
        [record["step"] for record in checked],
        [record["valid"] for record in checked],
        marker="o",
        ms=3,
        label="held-out TinyStories",
    )
    axes.set_ylabel("nats a token")
    axes.set_ylim(top=6)
    axes.legend()


def draw_shares(axes: Any, records: list[dict[str, Any]]) -> None:
    steps = [record["step"] for record in records]
    for layer in range(len(records[0]["shares"])):
        percent = [100 * record["shares"][layer] for record in records]
        axes.plot(steps, percent, lw=0.7, label=f"layer {layer}")
    axes.set_yscale("log")
    axes.set_ylabel("active FFN neurons, %")
    axes.legend(ncol=4, fontsize=8)


if __name__ == "__main__":
    typer.run(main)
