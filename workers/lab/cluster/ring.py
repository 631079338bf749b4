"""What one ring is told, and what it asks Ray for; and the look for Ray itself."""

from __future__ import annotations

import importlib.util
import logging
import os
from dataclasses import dataclass
from typing import Annotated, Any

import typer

from pipeline.launch import ROOT
from pipeline.planner.budget import parse_size
from pipeline.ring.supervisor import sweep_stale_directories
from storage.errors import UsageError

RAY_EXTRA = "pip install -c constraints.txt -e '.[ray]'"  # in flashring's own directory
OBJECTS = 100 << 20  # bytes of a local Ray's object store: prompts and texts are small

Cpus = Annotated[float, typer.Option(help="Processors that one ring asks Ray for.", min=0.001)]


@dataclass(frozen=True, slots=True)
class RingOptions:
    """The command line's options of one ring."""

    model: str
    memory: str
    context: int
    settings: tuple[str, ...]

    def resources(self, cpus: float) -> dict[str, Any]:
        """What an actor with this ring asks Ray for. Ray is not told of percentages."""
        wanted: dict[str, Any] = {"num_cpus": cpus}
        if self.memory and "%" not in self.memory:
            wanted["memory"] = parse_size(self.memory, "--memory", lambda: 0)
        return wanted


def start_ray() -> None:
    """Join the cluster of RAY_ADDRESS, or start a local Ray. Raises UsageError where there is no Ray."""
    if importlib.util.find_spec("ray") is None:
        raise UsageError(f"this needs more packages: {RAY_EXTRA}")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    logging.getLogger("ray.data").setLevel(logging.WARNING)
    ray.init(
        address=os.environ.get("RAY_ADDRESS"),
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.WARNING,
        runtime_env={"env_vars": {"PYTHONPATH": str(ROOT)}},
        object_store_memory=None if "RAY_ADDRESS" in os.environ else OBJECTS,
    )


def stop_ray() -> None:
    """Leave Ray. It ends actors and their rings by SIGKILL: what those shared is removed here."""
    import ray

    ray.shutdown()
    sweep_stale_directories()
