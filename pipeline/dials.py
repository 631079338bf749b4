"""The lossy dials of a mixture of experts, section `experts` of the configuration: off unless asked for.

- `per_token`: fewer experts than the model's routers choose, in prompts as well. The text still depends on
  the sets alone.
- `prefer`: an expert that is in a slot counts for more when a token's experts are chosen. What it counts for
  is a share of the distance from the row's lowest score to its highest. The likeliest expert is always kept,
  and weights stay the router's own.
- `skip`: an expert of little weight is left out where it would have to be read.

With the last two a token's experts depend on what is in slots, and with them the text.
"""

from __future__ import annotations

from dataclasses import replace

from pipeline.config import Config, Experts
from pipeline.ring.plan import Kind
from storage.architecture import Architecture, Layer
from storage.errors import ConfigError
from storage.store import Store


def most_experts(architecture: Architecture) -> int:
    """How many experts a token has of a layer, at most; 0 without routers."""
    return max((layer.ffn.router.top_k for layer in architecture.layers if layer.ffn.router), default=0)


def check(store: Store, config: Config, kind: Kind) -> None:
    """Raises ConfigError for dials that this model does not have, or this kind of predictor."""
    dials, most = config.experts, most_experts(store.architecture)
    on = [name for name in Experts.model_fields if getattr(dials, name)]
    if on and not most:
        raise ConfigError(f"experts.{on[0]} needs a mixture of experts, and {store.manifest.name} is none")
    if dials.per_token > most:
        raise ConfigError(
            f"experts.per_token {dials.per_token} is more than the {most} experts "
            f"that the routers of {store.manifest.name} choose"
        )
    by_residency = [name for name in on if name != "per_token"]
    if by_residency and kind != "router":
        raise ConfigError(
            f"experts.{by_residency[0]} needs predictor.kind router: with {kind} every expert is read"
        )


def with_fewer(store: Store, config: Config) -> Store:
    """The store, with routers that choose no more experts than `experts.per_token` says."""
    count = config.experts.per_token
    if not count:
        return store
    architecture = store.architecture
    layers = tuple(_with_fewer(layer, count) for layer in architecture.layers)
    return replace(store, manifest=replace(store.manifest, architecture=replace(architecture, layers=layers)))


def _with_fewer(layer: Layer, count: int) -> Layer:
    router = layer.ffn.router
    if router is None or router.top_k <= count:
        return layer
    return replace(layer, ffn=replace(layer.ffn, router=replace(router, top_k=count)))


def in_words(store: Store, config: Config) -> tuple[str, ...]:
    """The dials that are on; `store` is as it was opened."""
    dials, most = config.experts, most_experts(store.architecture)
    words = []
    if 0 < dials.per_token < most:
        words.append(f"{dials.per_token} of {most} experts")
    if dials.prefer:
        words.append(f"experts in memory preferred by {dials.prefer:g}")
    if dials.skip:
        words.append(f"absent experts below a weight of {dials.skip:g} skipped")
    return tuple(words)
