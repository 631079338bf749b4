"""A machine for plans: rates that are not measured, kept where the planner looks for measured ones."""

from __future__ import annotations

import json
from pathlib import Path

from pipeline.planner import pace, rates

KERNELS = ("float32", "float16", "bfloat16", "q8", "q4", "q4s")
RATES = pace.Rates(
    cores=2,
    read=30e9,
    kernels={name: pace.Kernel(25e9, 20e9, 15e9) for name in KERNELS},
    launch=50e-6,
    hop=80e-6,
    scoring=10e9,
    arithmetic=200e9,
    disk=((4096, 0.4e9), (16384, 1e9), (1 << 20, 2e9)),
    stream=2e9,
    latency=80e-6,
)


def keep(home: Path) -> None:
    """Leave the rates in `home`, as a probe of this machine and of its disk would."""
    home.mkdir(parents=True, exist_ok=True)
    memory = {name: getattr(RATES, name) for name in ("read", "launch", "hop", "scoring", "arithmetic")}
    disk = {name: getattr(RATES, name) for name in ("stream", "latency")} | {"rates": RATES.disk}
    kernel = {"product": 25e9, "dots": 20e9, "sums": 15e9}
    kept = {
        "machine": rates.machine(),
        "memory": memory,
        "kernels": dict.fromkeys(KERNELS, kernel),
        "disks": {str(home.stat().st_dev): disk},
    }
    (home / "machine.json").write_text(json.dumps(kept), encoding="utf-8")
