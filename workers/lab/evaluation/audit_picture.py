"""An audited run as a picture: `python -m workers.lab.evaluation.audit_picture RUN.json OUT.png`.

RUN.json is what `run.py --prompt … --audit --json` prints.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from pipeline import program
from storage.errors import UsageError
from workers.lab.pictures import picture

PANELS: dict[str, Callable[[dict[str, Any]], float]] = {
    "missed, % of active": lambda one: one["false_negatives"],
    "wrongly predicted, % of inactive": lambda one: one["false_positives"],
    "missed, % of the activations' magnitude": lambda one: 1 - one["weighted_recall"],
    "error of the FFN's output, %": lambda one: one["output_error"],
}


def main(
    audited: Annotated[Path, typer.Argument(metavar="RUN.json")],
    out: Annotated[Path, typer.Argument(metavar="OUT.png")],
) -> None:
    """Draw the audit of a run, layer by layer."""
    draw(_read(audited), out)


def _read(path: Path) -> list[dict[str, Any]]:
    """The audited layers. Raises UsageError for a file that has none."""
    try:
        layers: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["audit"]["layers"]
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path} is not the --json output of a run with --audit") from error
    return layers


def draw(layers: list[dict[str, Any]], out: Path) -> None:
    with picture(out, 2, 2, size=(9, 6), sharex=True) as panels:
        numbers = [one["layer"] for one in layers]
        for axes, (title, share) in zip(panels.flat, PANELS.items(), strict=True):
            axes.bar(numbers, [100 * share(one) for one in layers])
            axes.set_title(title, fontsize=10)
            axes.grid(alpha=0.3, axis="y")
        for axes in panels[1]:
            axes.set_xlabel("layer")


def run() -> int:
    """The command line's exit status."""
    return program.single(main)


if __name__ == "__main__":
    sys.exit(run())
