"""When a layer passed through the processes of a ring: stamps of one clock, kept only where they are wanted.

`FLASHRING_TIMELINE=DIR` in the environment of a ring makes each worker keep them and write `DIR/NAME.npy` at
its end. `workers/lab/bench/layers.py` reads them. The clock is the kernel's, the same in all processes.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

DIRECTORY: Final = "FLASHRING_TIMELINE"  # of the environment

# In the order in which a layer's set passes them. `layer` is the set's; of ANNOUNCED that of the source.
EVENTS: Final = (
    "announced",  # compute sends HiddenReady
    "heard",  # the predictor has it
    "predicted",  # and sends the set
    "foreseen",  # the cache has it
    "answered",  # and sends reads and schedule
    "asked",  # the prefetcher has the reads
    "begun",  # and has submitted them
    "read",  # and announces that all are there
    "needed",  # compute wants the layer's FFN
    "known",  # and has its first part
    "complete",  # and its last one
    "computed",  # and is done with it
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
) = range(len(EVENTS))

Stamps = npt.NDArray[np.int64]  # [n, 4]: event, step, layer, nanoseconds


class Timeline:
    """One process's stamps. Without a directory it keeps none."""

    def __init__(self, directory: Path | None = None) -> None:
        self._directory = directory
        self._stamps: list[tuple[int, int, int, int]] = []

    @classmethod
    def wanted(cls) -> Timeline:
        """As the environment says."""
        directory = os.environ.get(DIRECTORY)
        return cls(Path(directory) if directory else None)

    def mark(self, event: int, step: int, layer: int) -> None:
        """It happens now."""
        if self._directory is not None:
            self._stamps.append((event, step, layer, time.monotonic_ns()))

    def write(self, name: str) -> None:
        """Put what was kept into the directory."""
        if self._directory is not None:
            np.save(self._directory / f"{name}.npy", np.array(self._stamps, np.int64).reshape(-1, 4))


def read(directory: Path) -> Stamps:
    """All processes' stamps."""
    return np.concatenate([np.load(file) for file in sorted(directory.glob("*.npy"))])
