"""What was planned beside what came: told with `-v` after a run."""

from __future__ import annotations

from pipeline.console import size
from pipeline.planner import rates
from pipeline.planner.divide import PlanReport
from pipeline.planner.resolve import Resolved, predictor_bytes
from pipeline.planner.survey import Subject, of_report
from pipeline.planner.work import residents
from pipeline.ring.summary import Summary
from storage.errors import FlashringError
from storage.store import Store

FEWEST = 8  # tokens whose mean says something


def planned_beside(store: Store, report: PlanReport, summary: Summary) -> list[str]:
    """Milliseconds and bytes of a token, and memory; empty for an answer of a few tokens.

    Where this machine was never measured, how it is.
    """
    tokens = summary.generated_tokens - 1
    if tokens < FEWEST or report.config.compute.device != "cpu":
        return []
    known = rates.known(store.path)
    if known is None:
        return ["planned: this machine was not measured yet, which `run.py plan` does"]
    try:
        resolved = Resolved(report.config, report.plan.forecast, predictor_bytes(store, report.config))
        one = Subject(store.manifest.name, store, residents(store), resolved, made=True)
        planned = of_report(one, report, known, summary.prompt_tokens + tokens // 2)
    except FlashringError as error:
        return [f"planned: {error}"]
    spent = 1e3 * summary.seconds.decode / tokens
    parts = [
        (name, 1e3 * getattr(planned.pace, name)) for name in ("disk", "memory", "units", "layers", "head")
    ]
    by_source = ", ".join(f"{name} {value:,.1f}" for name, value in parts)
    return [
        f"planned: {1e3 * planned.pace.total:,.1f} ms a token ({by_source}), "
        f"{planned.work.flash / 1e6:,.2f} MB read, memory {size(report.total)}",
        f"came to: {spent:,.1f} ms a token, {summary.flash.bytes_per_token / 1e6:,.2f} MB read, "
        f"peak memory {size(summary.memory.peak_bytes)}",
    ]
