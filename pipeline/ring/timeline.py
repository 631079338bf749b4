"""When a layer passed through the processes of a ring: stamps of one clock, kept only where they are wanted.

`FLASHRING_TIMELINE=DIR` in the environment of a ring makes each worker keep them, in `DIR/RING/NAME.stamps`.
`pipeline/tracing` makes a trace of them, and `workers/lab/bench/layers.py` a profile. The clock is the
kernel's, the same in all processes.

A file holds int64 values, six for each stamp: event, step, layer, part, value, nanoseconds.
"""

from __future__ import annotations

import os
import time
from array import array
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

DIRECTORY: Final = "FLASHRING_TIMELINE"  # of the environment
SUFFIX: Final = ".stamps"

# In the order in which a layer's set passes them. `layer` is the set's; of ANNOUNCED and HEARD that of the
# source. What the value is stands behind those that have one.
EVENTS: Final = (
    "announced",  # compute sends HiddenReady
    "heard",  # the predictor has it
    "predicted",  # and sends the set
    "foreseen",  # the cache has it
    "answered",  # and sends reads and schedule; value: units of the layer that have a slot
    "asked",  # the prefetcher has a part's reads; value: bundles
    "begun",  # and has submitted them
    "read",  # and announces that all are there; value: bytes
    "needed",  # compute wants the layer's FFN
    "known",  # and has its first part
    "complete",  # and a part, at last its last one
    "computed",  # and is done with it
    # A token's way through compute, around its layers.
    "prompted",  # a step of a prompt begins; value: tokens
    "began",  # a step of decode begins; value: tokens
    "embedded",  # its residual stream is there, and layer 0 begins
    "added",  # a part has been added
    "looked",  # the audit has looked at the layer
    "choosing",  # compute asks its shadow for a layer's units
    "resting",  # and computes what it has meanwhile: the shadow's share, or experts where they lay before
    "told",  # a token is sent to the supervisor; step and layer: of the step before; value: its index
    # Guesses, which nobody waits for yet.
    "guessed",  # the predictor sends one
    "guess asked",  # the prefetcher has its reads; value: bundles
    "guess read",  # and all are there; value: bytes
)
(
    ANNOUNCED,
    HEARD,
    PREDICTED,
    FORESEEN,
    ANSWERED,
    ASKED,
    BEGUN,
    READ,
    NEEDED,
    KNOWN,
    COMPLETE,
    COMPUTED,
    PROMPTED,
    BEGAN,
    EMBEDDED,
    ADDED,
    LOOKED,
    CHOOSING,
    RESTING,
    TOLD,
    GUESSED,
    GUESS_ASKED,
    GUESS_READ,
) = range(len(EVENTS))

EVENT, STEP, LAYER, PART, VALUE, AT = range(6)  # columns of a stamp
COLUMNS: Final = 6
HELD: Final = 4096  # stamps in memory before they are written, which takes a tenth of a millisecond
MOST: Final = 500_000  # stamps of a worker, 24 MB: a server's timeline ends there, and the server goes on

Stamps = npt.NDArray[np.int64]  # [n, 6]


class Timeline:
    """One process's stamps. Without a directory it keeps none."""

    def __init__(self, file: Path | None = None, most: int = MOST) -> None:
        """What follows the first `most` stamps is not kept."""
        self.on = file is not None
        self._file = file
        self._held = array("q")
        self._left = most

    @classmethod
    def wanted(cls, ring: str, name: str) -> Timeline:
        """Of the worker `name`, as the environment says; `ring` tells it from others of that environment."""
        directory = os.environ.get(DIRECTORY)
        if not directory:
            return cls()
        place = Path(directory) / ring
        place.mkdir(exist_ok=True)
        return cls(place / f"{name}{SUFFIX}")

    def mark(self, event: int, step: int, layer: int, part: int = 0, value: int = 0) -> None:
        """It happens now."""
        if self.on:
            self._held.extend((event, step, layer, part, value, time.monotonic_ns()))
            if len(self._held) >= HELD * COLUMNS:
                self.write()

    def write(self) -> None:
        """Put what was kept behind what the file holds. A full disk ends the timeline, and nothing else."""
        if not self.on or self._file is None:
            return
        held = self._held[: self._left * COLUMNS]
        self._left -= len(held) // COLUMNS
        self._held = array("q")
        try:
            with self._file.open("ab") as stream:
                held.tofile(stream)
        except OSError:
            self.on = False
        if not self._left:
            self.on = False


def rings(directory: Path) -> list[dict[str, Stamps]]:
    """Each ring's stamps by worker, in the order in which the rings began."""
    found = [
        {file.stem: _stamps(file) for file in sorted(place.glob(f"*{SUFFIX}"))}
        for place in directory.iterdir()
        if place.is_dir()
    ]
    some = [ring for ring in found if any(len(one) for one in ring.values())]
    return sorted(some, key=lambda ring: min(int(one[0, AT]) for one in ring.values() if len(one)))


def read(directory: Path) -> Stamps:
    """All processes' stamps of the one ring there."""
    (ring,) = rings(directory)
    return np.concatenate(list(ring.values()))


def _stamps(file: Path) -> Stamps:
    whole = np.fromfile(file, np.int64)
    return whole[: len(whole) // COLUMNS * COLUMNS].reshape(-1, COLUMNS)
