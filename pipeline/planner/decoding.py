"""What a model's `generation_config.json` says of sampling: the default wherever nobody else says.

As in transformers, `do_sample` decides: without it the likeliest token is taken, and the file's temperature
holds only with it. A limit that the file does not name is none.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from pipeline.config import Config, Decoding
from storage.errors import ConfigError, StoreError, reason
from storage.store import Store
from storage.tokenizer import GENERATION_CONFIG

# What else changes a token's chances, with the value that changes nothing.
NOT_APPLIED = {
    "repetition_penalty": 1.0,
    "min_p": 0.0,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "no_repeat_ngram_size": 0,
}


@dataclass(frozen=True, slots=True)
class ModelDecoding:
    """What one model's file says."""

    said: dict[str, Any] = field(default_factory=dict)  # key of `Decoding` → value, not checked yet
    not_applied: dict[str, Any] = field(default_factory=dict)  # what we do not know how to do

    @classmethod
    def of(cls, store: Store) -> ModelDecoding:
        """Of a store; nothing for one without such a file. Raises StoreError for a damaged one."""
        path = store.path / GENERATION_CONFIG
        if GENERATION_CONFIG not in store.manifest.files:
            return cls()
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise StoreError(f"{path} cannot be read: {reason(error)}") from error
        if not isinstance(data, dict):
            raise StoreError(f"{path} is damaged: it is not a JSON object")
        given = {key: value for key, value in data.items() if value is not None}
        said = {key: given[key] for key in ("top_k", "top_p") if key in given}
        if given.get("do_sample"):
            said["temperature"] = given.get("temperature", 1.0)
        not_applied = {
            key: given[key] for key, neutral in NOT_APPLIED.items() if given.get(key, neutral) != neutral
        }
        return cls(said, not_applied)

    def left_open(self, decoding: Decoding) -> dict[str, Any]:
        """What the file decides: what it says, and neither command line nor configuration files did."""
        return {key: value for key, value in self.said.items() if key not in decoding.model_fields_set}


def fill(store: Store, config: Config) -> Config:
    """The configuration with the model's own defaults. Raises StoreError for a value that cannot be."""
    left = ModelDecoding.of(store).left_open(config.sampling)
    try:
        return config.replace(sampling=left) if left else config
    except ConfigError as error:
        raise StoreError(f"{store.path / GENERATION_CONFIG} is damaged: {error}") from error


def describe(store: Store, config: Config) -> str:
    """How tokens will be chosen, and who says so, for people; `config` as it was before `fill`."""
    model, chosen = ModelDecoding.of(store), fill(store, config).sampling
    if not chosen.temperature:
        return "sampling: none, always the likeliest token"
    words = [f"temperature {chosen.temperature:g}"]
    if chosen.top_k:
        words.append(f"top-k {chosen.top_k}")
    if chosen.top_p < 1:
        words.append(f"top-p {chosen.top_p:g}")
    line = f"sampling: {', '.join(words)}"
    if left := model.left_open(config.sampling):
        line += f"; the model's {GENERATION_CONFIG} decides {', '.join(sorted(left))}"
    if model.not_applied:
        not_applied = ", ".join(f"{key} {value}" for key, value in model.not_applied.items())
        line += f"; not applied: its {not_applied}"
    return line
