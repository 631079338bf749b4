"""`--timeline FILE`: rings that are started meanwhile keep stamps, of which a trace is made at the end."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

from pipeline.planner.probe import probe_rate
from pipeline.ring import timeline
from pipeline.ring.plan import Plan
from pipeline.tracing import trace
from pipeline.tracing.slices import slices_of
from pipeline.version import name_and_version
from storage.store import Store


class Recording:
    """Use as a context manager around the rings' whole life: workers write their last stamps at their end."""

    def __init__(self, file: Path | None, say: Callable[[str], None]) -> None:
        """Without a file nothing is recorded."""
        self._file, self._say = file, say
        self._directory: TemporaryDirectory[str] | None = None
        self._before: str | None = None
        self._of: tuple[Store, Plan] | None = None

    def of(self, store: Store, plan: Plan) -> None:
        """Whose rings these are."""
        self._of = store, plan

    def __enter__(self) -> Recording:
        if self._file is not None:
            self._directory = TemporaryDirectory(prefix="flashring-timeline-")
            self._before = os.environ.get(timeline.DIRECTORY)
            os.environ[timeline.DIRECTORY] = self._directory.name
        return self

    def __exit__(self, *_: object) -> None:
        """Raises UsageError for a file that cannot be written."""
        if self._directory is None or self._file is None:
            return
        del os.environ[timeline.DIRECTORY]
        if self._before is not None:
            os.environ[timeline.DIRECTORY] = self._before
        with self._directory:
            if self._of is not None:
                write(self._file, Path(self._directory.name), *self._of, self._say)


def write(file: Path, directory: Path, store: Store, plan: Plan, say: Callable[[str], None]) -> None:
    """Make the trace of the stamps in `directory`. Raises UsageError for a file that cannot be written."""
    rings = timeline.rings(directory)
    about = {
        "program": name_and_version(),
        "model": store.manifest.name,
        "layers": plan.layers,
        "slots": plan.total_slots,
        "units": sum(plan.units),
        "forecast": plan.to_json()["forecast"],
        "disk_ceiling": 0.0 if plan.whole else probe_rate(store),
    }
    trace.write(file, [slices_of(ring, plan.layers) for ring in rings], about)
    if any(len(stamps) >= timeline.MOST for ring in rings for stamps in ring.values()):
        say(f"the timeline ends where a worker had kept {timeline.MOST:,} stamps")
    say(f"the timeline is in {file}: run.py timeline FILE says what bounds the run, ui.perfetto.dev shows it")
