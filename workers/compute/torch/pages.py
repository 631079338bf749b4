"""Page-locked host memory that others have made, such as a ring's slots: CUDA then copies from it by itself.

Without it a copy goes through memory of the driver's own, and the host waits for it.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from pipeline.console import size


def lock(memory: npt.NDArray[np.uint8]) -> str:
    """Lock an array's pages for CUDA. Returns why that could not be, in one sentence; empty: they are.

    They stay locked as long as the process lives. All of them are taken now, and none is swapped.
    """
    try:
        status = int(torch.cuda.cudart().cudaHostRegister(memory.ctypes.data, memory.nbytes, 0))
        torch.cuda.check_error(status)
    except (RuntimeError, AttributeError) as error:  # the second: a torch without this function
        (reason, *_) = str(error).splitlines() or [type(error).__name__]
        return f"{size(memory.nbytes)} cannot be page-locked for the GPU, so copies take longer: {reason}"
    return ""
