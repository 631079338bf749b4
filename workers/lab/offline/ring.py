"""The trace of a mixture of experts, by a ring that decodes the text: its cache keeps every token's sets."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import numpy.typing as npt

from pipeline.config import Config
from pipeline.planner.divide import plan
from pipeline.ring.generation import GenerationParams
from pipeline.ring.session import Session
from storage.store import Store
from workers.cache import recording
from workers.lab.offline.record import Progress
from workers.lab.offline.trace import Trace, pack

NAME = "sets.npz"


@contextlib.contextmanager
def sets_file() -> Iterator[Path]:
    """Where rings that start meanwhile write their sets; gone afterwards."""
    with TemporaryDirectory(prefix="flashring-sets-") as directory:
        file = Path(directory) / NAME
        os.environ[recording.FILE] = str(file)
        try:
            yield file
        finally:
            del os.environ[recording.FILE]


def record(
    store: Store,
    config: Config,
    rows: npt.NDArray[np.int64],
    meta: dict[str, object],
    progress: Progress = lambda done, total: None,
) -> Trace:
    """The trace of token rows `[rows, length]`, each without its first token, the prompt, and its last."""
    config = config.replace(compute={"context": rows.shape[1]})
    report = plan(store, config)
    # A ring that holds every expert need not ask for them, and nothing would be heard: one slot fewer each.
    slots = tuple(
        min(slots, max(0, units - 1))
        for slots, units in zip(report.plan.slots, report.plan.units, strict=True)
    )
    with sets_file() as file:
        with Session(
            store, report.config, replace(report.plan, slots=slots), budget=report.budget
        ) as session:
            for number, row in enumerate(rows.tolist()):
                forced = GenerationParams(len(row) - 1, ignore_eos=True, forced=tuple(row[1:]))
                for done, _ in enumerate(session.pieces(row[:1], forced), 1):
                    progress(number * len(row) + done, rows.size)
        return of_ring(file, store, meta)


def of_ring(file: Path, store: Store, meta: dict[str, object]) -> Trace:
    """The trace of what a ring has written: a row a decoded token."""
    heads, ids = recording.read(file)
    layout = store.layout
    steps, rows = np.unique(heads[:, 0], return_inverse=True)
    masks = np.zeros((len(layout.layers), steps.size, layout.most_units), np.bool_)
    masks[np.repeat(heads[:, 1], heads[:, 2]), np.repeat(rows, heads[:, 2]), ids] = True
    floor = max(layer.ffn.router.top_k if layer.ffn.router else 1 for layer in store.architecture.layers)
    told = {"store": store.identity, "name": store.manifest.name, "top_k": floor, **meta}
    return Trace(layout.most_units, layout.stride, pack(masks), None, None, told)
