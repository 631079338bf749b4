"""A low-rank map in torch, as training makes it, and the file of finished maps.

The runtime's side is `predictor/lowrank.py`; FORMAT.md describes the file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import xxhash
from torch import Tensor

from storage.codecs import LARGEST_HALF
from storage.files import replacing
from storage.header import header_bytes
from storage.predictors import SUM
from storage.tensors import Tensors


@dataclass(frozen=True, slots=True)
class LowMap:
    """score = up @ (down @ (scale · x)) + bias; active where the score is above zero. All float32."""

    down: Tensor  # [rank, d_model]
    up: Tensor  # [d_ff, rank]
    bias: Tensor  # [d_ff]
    scale: float = 1.0  # of the input; training sees inputs that are scaled already
    guess: float = 0.0  # the score above which a guess is worth reading early
    resident: float = 0.0  # above which a resident neuron is worth computing
    absent: float = 0.0  # above which an absent one is worth reading

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    def scores(self, inputs: Tensor) -> Tensor:
        """`[n, d_ff]` of scaled inputs `[n, d_model]`."""
        return torch.addmm(self.bias, inputs @ self.down.T, self.up.T)

    def shifted(self, threshold: float) -> LowMap:
        """The same map with `threshold` folded into the bias."""
        return replace(self, bias=self.bias - threshold)

    def rounded(self) -> LowMap:
        """With the factors' magnitudes balanced, rank by rank, and rounded to float16 as in the file."""
        largest_up = self.up.abs().amax(0).clamp_min(1e-12)
        largest_down = self.down.abs().amax(1).clamp_min(1e-12)
        factor = (largest_up / largest_down).sqrt()
        down = (self.down * factor[:, None]).clamp(-LARGEST_HALF, LARGEST_HALF)
        up = (self.up / factor).clamp(-LARGEST_HALF, LARGEST_HALF)
        return replace(self, down=down.half().float(), up=up.half().float())

    def tensors(self, prefix: str) -> dict[str, Tensor]:
        """As FORMAT.md names them."""
        return {
            f"{prefix}.down": self.down.half(),
            f"{prefix}.up": self.up.half(),
            f"{prefix}.bias": self.bias.float(),
            **{
                f"{prefix}.{name}": torch.tensor([getattr(self, name)], dtype=torch.float32)
                for name in _SCALARS
            },
        }

    @classmethod
    def read(cls, file: Tensors, prefix: str) -> LowMap:
        """Inverse of `tensors`. Raises StoreError."""
        down, up, bias, *scalars = (
            torch.from_numpy(file.read(f"{prefix}.{name}").view(_KINDS[file.dtype(f"{prefix}.{name}")]))
            for name in ("down", "up", "bias", *_SCALARS)
        )
        return cls(down.float(), up.float(), bias, *(float(one[0]) for one in scalars))


# In the order of the class's fields.
_SCALARS = ("scale", "guess", "resident", "absent")
_KINDS = {"float16": np.float16, "float32": np.float32}
_NAMES = {torch.float16: "float16", torch.float32: "float32"}


def write(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file atomically; the same contents give the same bytes."""
    digest = xxhash.xxh3_128()
    for tensor in tensors.values():
        digest.update(tensor.contiguous().numpy().tobytes())
    header = header_bytes(
        ((name, _NAMES[tensor.dtype], tuple(tensor.shape)) for name, tensor in tensors.items()),
        {**metadata, SUM: digest.hexdigest()},
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        file.write(header)
        for tensor in tensors.values():
            file.write(tensor.contiguous().numpy().tobytes())
