"""16-bit floats in numpy, which holds them as uint16: widened to float32, and rounded from it."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

F32 = npt.NDArray[np.float32]
LARGEST_HALF = 65_504.0


def widen(array: npt.NDArray[Any], dtype: str) -> F32:
    """A float32 copy of an array of `dtype`'s carrier."""
    if dtype == "float32":
        return array.astype(np.float32)
    if dtype == "float16":
        return array.view(np.float16).astype(np.float32)
    return (array.astype(np.uint32) << 16).view(np.float32)


def narrow(array: F32, dtype: str) -> npt.NDArray[Any]:
    """`array` rounded to `dtype`, in its carrier; what is beyond float16's range becomes its largest."""
    if dtype == "float32":
        return array
    if dtype == "float16":
        return np.clip(array, -LARGEST_HALF, LARGEST_HALF).astype(np.float16).view(np.uint16)
    bits = array.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
