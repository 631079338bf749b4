"""Where a layer's time goes in a ring: `python -m workers.lab.bench.layers --model STORE --set …`.

A ring decodes some tokens while its workers stamp what they do (`pipeline/ring/timeline.py`). Printed are how
long each stage took between a layer's announcement and its end, how long compute waited, and what each
process's threads had of the cores: on them, and ready to run but without one.

Stages overlap with compute where layers are foreseen: they add up to a layer's time only with look-ahead 0.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import numpy as np
import typer

from pipeline import program
from pipeline.commands.options import (
    Bits,
    ConfigFile,
    Device,
    DeviceMemory,
    Memory,
    Model,
    Settings,
    TimelineFile,
)
from pipeline.config import Values
from pipeline.console import say
from pipeline.models.names import configure
from pipeline.planner.divide import plan as divide
from pipeline.ring import timeline
from pipeline.ring.generation import GenerationParams
from pipeline.ring.messages import EMBEDDING
from pipeline.ring.plan import Forecast
from pipeline.ring.session import Session
from pipeline.status import waiting
from pipeline.tracing.recording import write as write_trace
from storage.errors import UsageError
from workers.lab.bench.job import TEXT

Layer = Mapping[int, int]  # event → nanoseconds, of one layer of one step
Stage = Callable[[Layer], int | None]  # nanoseconds; None where the layer had no such stage


def _between(earlier: int, later: int) -> Stage:
    return lambda at: at[later] - at[earlier] if earlier in at and later in at else None


def _waking(sent: int, had: int) -> Stage:
    """From when a message was sent, or compute began to wait if that was later, to when compute had it."""
    return lambda at: at[had] - max(at[sent], at[timeline.NEEDED]) if sent in at and had in at else None


STAGES: Mapping[str, Stage] = {
    "announced → predictor has it": _between(timeline.ANNOUNCED, timeline.HEARD),
    "predictor": _between(timeline.HEARD, timeline.PREDICTED),
    "predicted → cache has it": _between(timeline.PREDICTED, timeline.FORESEEN),
    "cache": _between(timeline.FORESEEN, timeline.ANSWERED),
    "answered → prefetcher has it": _between(timeline.ANSWERED, timeline.ASKED),
    "prefetcher submits": _between(timeline.ASKED, timeline.BEGUN),
    "reads": _between(timeline.BEGUN, timeline.READ),
    "schedule there → compute has it": _waking(timeline.ANSWERED, timeline.KNOWN),
    "reads there → compute has them": _waking(timeline.READ, timeline.COMPLETE),
    "announced → answered": _between(timeline.ANNOUNCED, timeline.ANSWERED),
    "announced → read": _between(timeline.ANNOUNCED, timeline.READ),
    "compute: needed → first part": _between(timeline.NEEDED, timeline.KNOWN),
    "compute: first part → last part": _between(timeline.KNOWN, timeline.COMPLETE),
    "compute: last part → computed": _between(timeline.COMPLETE, timeline.COMPUTED),
}


PHASES = ("attention", "ffn", "waiting", "head")  # of compute
PREFETCHER = ("decode_bundles", "decode_reads", "decode_bytes", "batches", "wakes")  # counters worth telling


@dataclass(frozen=True, slots=True)
class Spread:
    """Of one stage over the layers that have it; microseconds."""

    median: float
    mean: float
    p90: float
    layers: int

    @classmethod
    def of(cls, values: list[int]) -> Spread:
        scaled = np.array(values) / 1e3
        return cls(
            float(np.median(scaled)), float(scaled.mean()), float(np.quantile(scaled, 0.9)), len(values)
        )


@dataclass(frozen=True, slots=True)
class Share:
    """What threads of one name had of the cores for one layer."""

    ran_us: float
    ready_us: float  # they could have run, and had no core
    turns: float


@dataclass(slots=True)
class Cores:
    """What threads had of the cores since they began."""

    ran: int = 0  # nanoseconds
    ready: int = 0  # nanoseconds without a core
    turns: int = 0

    @classmethod
    def of(cls, pid: int) -> dict[str, Cores]:
        """By the threads' names. Linux tells; empty where it does not."""
        found: dict[str, Cores] = defaultdict(cls)
        for task in Path(f"/proc/{pid}/task").glob("*"):
            name = (task / "comm").read_text().strip()
            ran, ready, turns = (int(word) for word in (task / "schedstat").read_text().split())
            one = found[name]
            one.ran, one.ready, one.turns = one.ran + ran, one.ready + ready, one.turns + turns
        return dict(found)

    def since(self, before: Cores) -> Cores:
        return Cores(self.ran - before.ran, self.ready - before.ready, self.turns - before.turns)

    def each(self, count: int) -> Share:
        """Of one of `count` layers."""
        return Share(self.ran / 1e3 / count, self.ready / 1e3 / count, self.turns / count)


@dataclass(frozen=True, slots=True)
class Profile:
    """What was found: means over the decoded tokens' layers, but `token_ms` and `layer_us` are medians."""

    model: str
    layers: int
    resident: float  # share of the FFN that has slots
    forecast: Mapping[str, Any]
    notes: tuple[str, ...]
    token_ms: float
    layer_us: float  # of a token, head and embedding included
    compute_us: Mapping[str, float]  # by phase
    prefetcher: Mapping[str, float]
    cores: Mapping[str, Share]  # by process and thread
    stages_us: Mapping[str, Spread] = field(default_factory=dict)

    def table(self) -> str:
        """For people."""
        compute = ", ".join(f"{name} {value:,.0f}" for name, value in self.compute_us.items())
        reads = ", ".join(
            f"{name.removeprefix('decode_')} {value:,.1f}" for name, value in self.prefetcher.items()
        )
        stages = (
            f"{name:<36}{one.median:>8.0f}{one.mean:>8.0f}{one.p90:>8.0f}{one.layers:>8}"
            for name, one in self.stages_us.items()
        )
        threads = (
            f"{name:<36}{one.ran_us:>8.1f}{one.ready_us:>10.1f}{one.turns:>8.2f}"
            for name, one in sorted(self.cores.items(), key=lambda item: -item[1].ran_us)
            if one.turns
        )
        lines = (
            f"{self.model}: {self.layers} layers, {self.resident:.0%} of the FFN in slots; "
            f"{self.token_ms:.1f} ms a token, {self.layer_us:,.0f} µs a layer with head and embedding",
            *self.notes,
            f"{'stage, µs':<36}{'median':>8}{'mean':>8}{'p90':>8}{'layers':>8}",
            *stages,
            f"compute, µs a layer: {compute}",
            f"prefetcher, a layer: {reads}",
            f"{'threads, a layer':<36}{'ran µs':>8}{'ready µs':>10}{'turns':>8}",
            *threads,
        )
        return "\n".join(lines)


def layers_of(stamps: timeline.Stamps, forecast: Forecast, first: int, last: int) -> list[Layer]:
    """The layers of steps `first` .. `last` whose sets were predicted from a layer, each with its stamps."""
    ahead = 0 if forecast.from_own_input else forecast.lookahead
    found: dict[tuple[int, int], dict[int, int]] = defaultdict(dict)
    ordered = stamps[stamps[:, timeline.AT].argsort(kind="stable")]
    for event, step, layer, _, _, at in ordered.tolist():
        if not first <= step <= last or event > timeline.COMPUTED:
            continue
        of_source = event in (timeline.ANNOUNCED, timeline.HEARD)
        if of_source and layer == EMBEDDING:
            continue
        found[step, layer + ahead if of_source else layer][event] = at  # of several, the last
    wanted = (timeline.ANNOUNCED, timeline.NEEDED, timeline.COMPUTED)
    return [one for one in found.values() if all(event in one for event in wanted)]


def stages_of(layers: list[Layer]) -> dict[str, Spread]:
    """What each stage took, where any layer had it."""
    found = {name: [at for one in layers if (at := stage(one)) is not None] for name, stage in STAGES.items()}
    return {name: Spread.of(values) for name, values in found.items() if values}


def measure(session: Session, prompt: list[int], tokens: list[int]) -> Profile:
    """Decode `tokens` twice, the first time to warm up. What only stamps tell is missing."""
    forced = GenerationParams(len(tokens), ignore_eos=True, forced=tuple(tokens))
    for _ in session.pieces(prompt, forced):
        pass
    before: dict[str, dict[str, Cores]] = {}
    for _ in session.pieces(prompt, forced):
        if not before:
            before = {name: Cores.of(pid) for name, pid in session.ring.pids.items()}
    after = {name: Cores.of(pid) for name, pid in session.ring.pids.items()}
    last, layers = session.last, session.plan.layers
    assert last is not None
    count = (len(tokens) - 1) * layers
    seconds = statistics.median(later - earlier for earlier, later in pairwise(last.moments))
    return Profile(
        model=session.store.manifest.name,
        layers=layers,
        resident=session.plan.total_slots / sum(session.plan.units),
        forecast=session.plan.to_json()["forecast"],
        notes=tuple(session.ring.notes),
        token_ms=1e3 * seconds,
        layer_us=1e6 * seconds / layers,
        compute_us={name: 1e6 * last.delta("compute", f"{name}_seconds") / count for name in PHASES},
        prefetcher={name: last.delta("prefetcher", name) / count for name in PREFETCHER},
        cores={
            f"{name} {thread}": cores.since(before[name].get(thread, Cores())).each(count)
            for name, threads in after.items()
            for thread, cores in threads.items()
        },
    )


def _tokens(session: Session, prompt_tokens: int, count: int) -> tuple[list[int], list[int]]:
    """The prompt's and the answer's. Raises UsageError where the text has too few."""
    ids = session.encode(TEXT.read_text(encoding="utf-8"))[: prompt_tokens + count]
    if len(ids) < prompt_tokens + count:
        raise UsageError(f"the text has {len(ids)} tokens, fewer than {prompt_tokens} + {count}")
    return ids[:prompt_tokens], ids[prompt_tokens:]


def main(
    model: Model = "",
    memory: Memory = "",
    device: Device = "",
    device_memory: DeviceMemory = "",
    bits: Bits = None,
    config_file: ConfigFile = None,
    settings: Settings = None,
    prompt_tokens: Annotated[int, typer.Option(help="Tokens of the prompt.", min=1)] = 16,
    tokens: Annotated[int, typer.Option(help="Tokens decoded, twice; the second time counts.", min=2)] = 32,
    as_json: Annotated[bool, typer.Option("--json", help="Print one object.")] = False,
    timeline_file: TimelineFile = None,
) -> None:
    """Say where a layer's time goes in a ring, stage by stage and process by process."""
    values: Values = {
        "model": {"bits": bits},
        "memory": {"budget": memory or None},
        "compute": {
            "context": prompt_tokens + tokens,
            "device": device or None,
            "device_memory": device_memory or None,
        },
    }
    source, config = configure(model, config_file, settings or (), values)
    store = source.open_store()
    report = divide(store, config)
    with TemporaryDirectory(prefix="flashring-timeline-") as directory:
        os.environ[timeline.DIRECTORY] = directory
        with Session(store, report.config, report.plan, budget=report.budget) as ring, waiting("measuring"):
            found = measure(ring, *_tokens(ring, prompt_tokens, tokens))
        stamps = timeline.read(Path(directory))
        if timeline_file is not None:
            write_trace(timeline_file, Path(directory), store, report.plan, say)
    last = int(stamps[:, timeline.STEP].max())
    layers = layers_of(stamps, report.plan.forecast, last - tokens + 2, last)
    found = replace(found, stages_us=stages_of(layers))
    print(json.dumps(asdict(found), indent=2) if as_json else found.table())


def run() -> int:
    """The command line's exit status."""
    return program.single(main)


if __name__ == "__main__":
    sys.exit(run())
