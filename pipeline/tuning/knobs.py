"""What may be turned: settings that change a token's time and never its text, the most promising first."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

from pipeline.config import Config
from pipeline.cores import cores
from pipeline.ring.plan import Plan

Value: TypeAlias = int | float | bool
Settings: TypeAlias = Mapping[str, Value]  # `section.key` → value

KIB: Final = 1 << 10
DEPTHS: Final = (16, 32, 64, 128, 256)
PIECES: Final = (256 * KIB, 512 * KIB, 1024 * KIB, 2048 * KIB, 4096 * KIB)  # bytes of one read
GAPS: Final = (0, 4 * KIB, 16 * KIB, 64 * KIB)
HALF_LIVES: Final = (8.0, 16.0, 32.0, 64.0, 128.0)  # tokens


@dataclass(frozen=True, slots=True)
class Knob:
    """A setting and the values that make sense, ascending; the one that is set is among them."""

    key: str
    values: tuple[Value, ...]

    def beside(self, value: Value) -> tuple[tuple[Value, ...], tuple[Value, ...]]:
        """The values above and below one, each from the nearest on."""
        at = self.values.index(value)
        return self.values[at + 1 :], self.values[:at][::-1]


def knobs(config: Config, plan: Plan) -> list[Knob]:
    """Those of a resolved configuration and its plan: what is never read need not be read otherwise."""
    threads = Knob("compute.threads", tuple(range(1, cores() + 1)))
    if plan.forecast.low or plan.total_slots == sum(plan.units):
        return [_with(threads, config)]
    found = []
    forecast = plan.forecast
    if forecast.routed:
        found.append(Knob("predictor.guesses", (0, 1, 2, 4)))
    if forecast.routed or forecast.every or forecast.refines:
        found.append(Knob("predictor.lookahead", (1, 2, 3)))
    found += [Knob("prefetcher.readers", (1, 2, 4)), Knob("prefetcher.queue_depth", DEPTHS)]
    if forecast.every or plan.stride > PIECES[0]:
        found.append(Knob("prefetcher.max_read", PIECES))
    found.append(threads)
    if not forecast.every:
        found += [Knob("cache.half_life", HALF_LIVES), Knob("prefetcher.max_gap", GAPS)]
    found.append(Knob("prefetcher.direct", (False, True)))
    return [_with(one, config) for one in found]


def start(config: Config, found: list[Knob]) -> dict[str, Value]:
    """The values that are set, of these knobs."""
    return {one.key: _of(config, one.key) for one in found}


def changed(config: Config, settings: Settings) -> Config:
    """The configuration with these settings. Raises ConfigError for what cannot be."""
    sections: dict[str, dict[str, Any]] = {}
    for key, value in settings.items():
        section, name = key.split(".")
        sections.setdefault(section, {})[name] = value
    return config.replace(**sections)


def _with(knob: Knob, config: Config) -> Knob:
    value = _of(config, knob.key)
    return Knob(knob.key, tuple(sorted({*knob.values, value})))


def _of(config: Config, key: str) -> Value:
    section, name = key.split(".")
    value: Value = getattr(getattr(config, section), name)
    return cores() if key == "compute.threads" and value == 0 else value
