"""Whether a ring drafts: several tokens a step, where a step reads every unit anyway."""

from __future__ import annotations

from pipeline.config import Config
from pipeline.ring.plan import Plan
from storage.errors import ConfigError
from storage.store import Store


def most_drafts(store: Store, config: Config, plan: Plan) -> int:
    """Drafts of one step at most, 0 for none. Raises ConfigError where they are asked for and cannot be.

    By default there are none where nothing is read, since every row is computed: there they save little.
    """
    drafts = config.drafts
    if drafts.kind == "off":
        return 0
    problem = _problem(store, plan)
    if drafts.kind == "auto":
        return 0 if problem or plan.whole else drafts.length
    if problem:
        raise ConfigError(f"drafts.kind {drafts.kind} {problem}")
    return drafts.length


def _problem(store: Store, plan: Plan) -> str:
    """Why a step of this model has one token; empty: it may have several."""
    if store.architecture.mixture:
        return (
            f"is for models whose tokens all read the same, and {store.manifest.name} is a mixture of experts"
        )
    if not plan.forecast.every:
        return (
            "needs predictor.kind all: with predicted sets "
            f"({plan.forecast.kind}) each token of {store.manifest.name} reads others"
        )
    return ""
