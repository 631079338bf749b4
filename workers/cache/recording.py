"""The sets of decoded tokens, layer by layer, kept only where somebody wants them: a ring's trace.

`FLASHRING_SETS=FILE.npz` in the environment of a ring makes its cache keep them, and write the file at its
end: `heads` int64 [n, 3], of each set its step, layer and size, and `ids` int32, of one set behind the other.
Of a set with doubtful neurons only the certain ones are kept, and no stand-ins.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from pipeline.ring.messages import NeuronsPredicted

FILE: Final = "FLASHRING_SETS"  # of the environment

Sets = tuple[npt.NDArray[np.int64], npt.NDArray[np.int32]]  # heads and ids


class Recording:
    """One ring's sets. Without a file it keeps none."""

    def __init__(self, file: Path | None = None) -> None:
        self._file = file
        self._heads: list[tuple[int, int, int]] = []
        self._ids: list[npt.NDArray[np.int32]] = []

    @classmethod
    def wanted(cls) -> Recording:
        """As the environment says."""
        file = os.environ.get(FILE)
        return cls(Path(file) if file else None)

    def keep(self, message: NeuronsPredicted, ids: npt.NDArray[np.int32]) -> None:
        """A prediction has come, with the ids that it lists."""
        if self._file is None or message.guess or message.step.every:
            return
        certain = ids[: message.certain]
        certain = certain[certain >= 0]
        self._heads.append((message.step.number, message.layer, certain.size))
        self._ids.append(certain)

    def write(self) -> None:
        """Put what was kept into the file."""
        if self._file is not None:
            heads = np.array(self._heads, np.int64).reshape(-1, 3)
            np.savez(self._file, heads=heads, ids=np.concatenate([np.zeros(0, np.int32), *self._ids]))


def read(file: Path) -> Sets:
    """What a ring has written."""
    with np.load(file, allow_pickle=False) as found:
        return found["heads"], found["ids"]
