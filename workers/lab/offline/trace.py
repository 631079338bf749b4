"""A trace: for every token of a text and every layer, the neurons that were active, and chosen; or experts.

One `.npz` file: `active`, and where predictors chose, `predicted` and maybe `guessed`, each uint8
`[layers, tokens, ceil(d_ff / 8)]`, lowest bit first; `meta`, a JSON text: `d_ff`, `stride` (bytes of
a bundle), `store` (identity of the weights), `config`; of experts `top_k`.
"""

from __future__ import annotations

import json
import zipfile
import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from storage.errors import StoreError, StoreMissing, reason
from storage.files import replacing

Bits = npt.NDArray[np.uint8]
VERSION = 1
DAMAGED = (zipfile.BadZipFile, zlib.error)


def pack(mask: npt.NDArray[np.bool_]) -> Bits:
    """`[n, ceil(d_ff / 8)]` of `[n, d_ff]`."""
    return np.packbits(mask, axis=-1, bitorder="little")


@dataclass(frozen=True, slots=True)
class Trace:
    """Sets of neurons as bits."""

    d_ff: int
    stride: int  # bytes that reading a neuron costs
    active: Bits  # pre-activation above zero
    predicted: Bits | None  # computed; None: the model ran with every neuron
    guessed: Bits | None  # read early, from an earlier layer
    meta: dict[str, Any]

    @property
    def layers(self) -> int:
        return len(self.active)

    @property
    def tokens(self) -> int:
        return len(self.active[0])

    @property
    def top_k(self) -> int:
        """Experts of a token; 0 of a trace of neurons."""
        return int(self.meta.get("top_k", 0))

    @property
    def used(self) -> Bits:
        """What a ring that made the trace would have had in DRAM: the chosen neurons."""
        return self.active if self.predicted is None else self.predicted

    def only_active(self) -> Trace:
        """As if the oracle had predicted: what was active was used."""
        return replace(self, predicted=None, guessed=None)

    def masks(self, bits: Bits, layer: int) -> npt.NDArray[np.bool_]:
        """One layer, unpacked: `[tokens, d_ff]`."""
        return np.unpackbits(bits[layer], axis=1, count=self.d_ff, bitorder="little").view(np.bool_)

    def save(self, path: Path) -> None:
        """Write the file, whole or not at all."""
        arrays = {"active": self.active, "predicted": self.predicted, "guessed": self.guessed}
        meta = {**self.meta, "version": VERSION, "d_ff": self.d_ff, "stride": self.stride}
        present: dict[str, Any] = {name: one for name, one in arrays.items() if one is not None}
        with replacing(path) as file:
            np.savez_compressed(file, meta=np.array(json.dumps(meta)), **present)

    @classmethod
    def load(cls, path: Path) -> Trace:
        """Raises StoreMissing where there is no trace, StoreError for a damaged one."""
        try:
            with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
                arrays = {name: file[name] for name in file.files}
            meta = json.loads(str(arrays.pop("meta")))
            if meta.pop("version") != VERSION:
                raise StoreError(f"{path} is a trace of another version: record it again")
            d_ff, stride = int(meta.pop("d_ff")), int(meta.pop("stride"))
            shape = (*arrays["active"].shape[:2], -(-d_ff // 8))
        except OSError as error:
            raise StoreMissing(f"{path} cannot be read: {reason(error)}") from error
        except (ValueError, KeyError, TypeError, AttributeError, EOFError, *DAMAGED) as error:
            raise StoreMissing(f"{path} is not a trace") from error
        if any(array.shape != shape or array.dtype != np.uint8 for array in arrays.values()):
            raise StoreError(f"{path} is damaged: its arrays do not fit together")
        return cls(d_ff, stride, arrays["active"], arrays.get("predicted"), arrays.get("guessed"), meta)
