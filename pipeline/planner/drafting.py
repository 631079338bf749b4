"""Whether a ring drafts: several tokens a step, where a step reads every unit anyway."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from pipeline.config import Config
from pipeline.ring.plan import Plan
from storage.errors import ConfigError, StoreError
from storage.store import Store
from storage.tokenizer import load_tokenizer

PIECE: Final = 128  # tokens of a prompt that a draft model reads at once


def most_drafts(store: Store, config: Config, plan: Plan) -> int:
    """Drafts of one step at most, 0 for none. Raises ConfigError where they are asked for and cannot be.

    By default there are none where nothing is read, since every row is computed: there they save little.
    """
    drafts = config.drafts
    if drafts.kind == "off":
        return 0
    problem = _problem(store, config, plan)
    if drafts.kind == "auto":
        return 0 if problem or plan.whole else drafts.length
    if problem:
        raise ConfigError(f"drafts.kind {drafts.kind} {problem}")
    return drafts.length


def draft_store(config: Config) -> Store | None:
    """The store of the draft model, if there is to be one. Raises ConfigError."""
    if config.drafts.kind != "model":
        return None
    if not config.drafts.model:
        raise ConfigError("drafts.kind model needs drafts.model, the directory of a store")
    try:
        return Store.open(Path(config.drafts.model))
    except StoreError as error:
        raise ConfigError(f"drafts.model: {error}") from error


def check_draft_model(store: Store, config: Config) -> None:
    """Raises ConfigError for a draft model that has other tokens than `store`."""
    found = draft_store(config)
    if found is None:
        return
    theirs, ours = (load_tokenizer(one).get_vocab(with_added_tokens=True) for one in (found, store))
    if theirs != ours:
        raise ConfigError(
            f"{found.manifest.name} cannot draft for {store.manifest.name}: their tokenizers differ"
        )


def _problem(store: Store, config: Config, plan: Plan) -> str:
    """Why a step of this model has one token; empty: it may have several."""
    if config.compute.device != "cpu":
        return f"needs compute.device cpu, and it is {config.compute.device}"
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
