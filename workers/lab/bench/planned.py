"""`python -m workers.lab.bench.planned --models builtin,STORE --memory 520MiB,60%`: what was planned, and
came.

Each model is planned under each budget, and then its ring decodes the same forced tokens under it, in a
memory cgroup where there can be one. Printed are a token's planned and measured milliseconds, and their
ratio. A budget is a size, a share of the checkpoint as elsewhere, or `least`, `half` and `most` of the
way from the smallest memory that works to all of the model.

The machine is measured before and after each run. Where the two would plan times that differ by more than
DRIFT, it has changed meanwhile, and the row is run again, TRIES times at most.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from pipeline import program
from pipeline.commands.options import JsonFile, Settings
from pipeline.console import say, size, tables
from pipeline.models.names import configure
from pipeline.planner import rates
from pipeline.planner.divide import least_of, most_of
from pipeline.planner.survey import Outlook, Subject, outlook, subject, with_memory
from pipeline.status import waiting
from storage.errors import BudgetError, UsageError
from storage.files import write_whole
from workers.lab.bench import job
from workers.lab.bench.children import ChildFailed

STEPS = {"least": 0.0, "half": 0.5, "most": 1.0}
MIB, SLACK = 1 << 20, 2  # bytes, and so many more: the prompt may be some tokens longer
PROMPT = 32  # tokens
WARM = 8  # first tokens, which are not counted: slots fill
GOAL, BOUND = 0.15, 0.25  # of the measured time
DRIFT = 0.15  # of the planned time, from before a run to after it
TRIES = 3  # of a row


@dataclass(frozen=True, slots=True)
class Line:
    """One model under one budget; milliseconds and bytes of a token."""

    model: str
    bits: int
    memory: int
    planned_ms: float
    planned_after_ms: float  # by what the machine did after the run
    measured_ms: float
    planned_bytes: float
    measured_bytes: float
    parts: dict[str, float]  # of the planned time
    measured_parts: dict[str, float]

    @property
    def ratio(self) -> float:
        """Planned ÷ measured."""
        return self.planned_ms / self.measured_ms

    @property
    def drift(self) -> float:
        """By how much the machine became slower during the run, as a plan sees it; below 0: quicker."""
        return self.planned_after_ms / self.planned_ms - 1


def budgets(one: Subject, words: Sequence[str]) -> list[str]:
    """What the words stand for, as `--memory` takes it."""
    low, high = (found(one.store, one.resolved).total for found in (least_of, most_of))
    return [
        f"{math.ceil((low + STEPS[word] * (high - low)) / MIB) + SLACK}MiB" if word in STEPS else word
        for word in words
    ]


def _subject(name: str, settings: tuple[str, ...], tokens: int) -> Subject:
    """As it is known before any of its rings, since a ring leaves what it has shown to later plans."""
    source, _ = configure(name, None, settings)
    source.open_store()
    return subject(name, settings=[f"compute.context={PROMPT + tokens}", *settings])


def _planned(one: Subject, budget: str, tokens: int, *, probe: bool) -> Outlook:
    """Its plan by what the machine does now. Raises BudgetError."""
    codecs = tuple({*rates.CODECS, *one.codecs})
    known = rates.measured(one.store.path, codecs, renew=probe, say=say)
    return outlook(with_memory(one, budget), known, PROMPT + tokens // 2)


def _steady(
    one: Subject, budget: str, settings: tuple[str, ...], tokens: int, *, probe: bool, fresh: bool
) -> Line:
    """A run that the machine did not change in, or the last of TRIES. `fresh`: it was measured just now."""
    planned = _planned(one, budget, tokens, probe=probe and not fresh)
    for _ in range(TRIES):
        with waiting(f"measuring {one.name} in {budget}"):
            line = measure(planned, budget, settings, tokens)
        if not probe:
            return line
        after = _planned(one, budget, tokens, probe=True)
        line = replace(line, planned_after_ms=1e3 * after.pace.total)
        say(f"{line.model} {size(line.memory)}: ratio {line.ratio:.2f}, drift {line.drift:+.0%}")
        if abs(line.drift) <= DRIFT:
            break
        planned = after
    return line


def measure(planned: Outlook, budget: str, settings: tuple[str, ...], tokens: int) -> Line:
    """Run what was planned. Raises ChildFailed."""
    with job.make_job(
        planned.subject.store,
        text=job.TEXT,
        prompt_tokens=PROMPT,
        count=tokens,
        budget=budget,
        repeats=1,
        threads=0,
        quick=False,
        settings=settings,
        say=say,
    ) as made:
        series = made.ring("planned", budget=budget)
        row = series.again()
        if row.error:
            raise ChildFailed(row.error)
        times = series.runs[0].result["token_seconds"][WARM:]
    parts = {
        "io": row.io_ms,
        "prediction": row.prediction_ms,
        "compute": row.compute_ms,
        "waiting": row.waiting_ms,
        "other": row.other_ms,
        "hits": row.hit_rate,
    }
    return _line(planned, 1e3 * statistics.fmean(times), row.bytes_per_token, parts)


def _line(planned: Outlook, milliseconds: float, read: float, parts: dict[str, float]) -> Line:
    return Line(
        planned.subject.name,
        planned.subject.bits,
        planned.report.total,
        1e3 * planned.pace.total,
        1e3 * planned.pace.total,
        milliseconds,
        planned.work.flash,
        read,
        {name: 1e3 * value for name, value in asdict(planned.pace).items()},
        parts,
    )


def table(lines: Sequence[Line]) -> Table:
    """For people."""
    found = Table()
    for heading in (
        "model",
        "bits",
        "memory",
        "planned ms",
        "measured ms",
        "ratio",
        "drift",
        "planned MB",
        "measured MB",
    ):
        found.add_column(heading, justify="left" if heading == "model" else "right")
    for one in lines:
        found.add_row(
            one.model,
            str(one.bits),
            size(one.memory),
            f"{one.planned_ms:,.1f}",
            f"{one.measured_ms:,.1f}",
            f"{one.ratio:.2f}",
            f"{one.drift:+.0%}",
            f"{one.planned_bytes / 1e6:,.2f}",
            f"{one.measured_bytes / 1e6:,.2f}",
        )
    return found


def main(
    models: Annotated[
        str, typer.Option(help="Presets, files and directories, with commas between.")
    ] = "builtin",
    memory: Annotated[
        str, typer.Option(help="Budgets: sizes, shares, least, half and most, with commas between.")
    ] = "least,half,most",
    tokens: Annotated[int, typer.Option(help="Tokens decoded.", min=WARM + 2)] = 64,
    probe: Annotated[
        bool,
        typer.Option("--probe/--no-probe", help="Measure the machine around each row: it changes."),
    ] = True,
    settings: Settings = None,
    json_file: JsonFile = None,
) -> None:
    """Hold what `run.py plan` says against what a ring does. Run it on a machine that does nothing else."""
    fixed = tuple(settings or ())
    lines: list[Line] = []
    for name in models.split(","):
        one = _subject(name, fixed, tokens)
        for budget in budgets(one, memory.split(",")):
            try:
                lines.append(_steady(one, budget, fixed, tokens, probe=probe, fresh=bool(lines)))
            except (BudgetError, ChildFailed) as error:
                say(f"{one.name} in {budget}: {error}")
                continue
    if not lines:
        raise UsageError("nothing could be measured")
    tables().print(table(lines))
    within = [sum(abs(one.ratio - 1) <= bound for one in lines) for bound in (GOAL, BOUND)]
    print(f"within {GOAL:.0%}: {within[0]} of {len(lines)}; within {BOUND:.0%}: {within[1]}")
    if json_file is not None:
        write_whole(Path(json_file), program_json(lines).encode())


def program_json(lines: Sequence[Line]) -> str:
    """For programs."""
    return json.dumps([{**asdict(one), "ratio": one.ratio} for one in lines], indent=2) + "\n"


def run() -> int:
    """The command line's exit status."""
    return program.single(main)


if __name__ == "__main__":
    sys.exit(run())
