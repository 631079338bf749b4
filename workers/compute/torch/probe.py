"""`python -m workers.compute.torch.probe cuda|mps`: whether torch has that device, and its free memory.

Prints one JSON object: `{"name": …, "free": bytes, "total": bytes}`, or `{"missing": reason}`. A process of
its own, so that who plans a ring need not hold torch.
"""

from __future__ import annotations

import json
import sys

import torch


def look(kind: str) -> dict[str, object]:
    """What is printed."""
    if kind == "cuda":
        if not torch.backends.cuda.is_built():
            return {"missing": f"torch {torch.__version__} here is built without CUDA"}
        if not torch.cuda.is_available():
            return {"missing": f"torch {torch.__version__} finds no CUDA device"}
        free, total = torch.cuda.mem_get_info()
        return {"name": torch.cuda.get_device_name(), "free": free, "total": total}
    if not torch.backends.mps.is_available():
        return {"missing": f"torch {torch.__version__} finds no Metal device"}
    total = torch.mps.recommended_max_memory()
    return {"name": "Metal", "free": total - torch.mps.driver_allocated_memory(), "total": total}


if __name__ == "__main__":
    print(json.dumps(look(sys.argv[1])))
