"""Programs whose kernels are compiled for a smaller processor than this one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

HASWELL = {"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": "+avx2,+fma,+f16c,+bmi,+bmi2,+popcnt"}


def on_haswell(script: str, cache: Path) -> str:
    """What the script prints; its kernels are cached apart, in `cache`."""
    environment = {**os.environ, **HASWELL, "NUMBA_CACHE_DIR": str(cache)}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, check=True, capture_output=True, text=True
    )
    return done.stdout
