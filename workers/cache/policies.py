"""Eviction policies by name, as `cache.policy` names them. A new one is a file and an entry here."""

from __future__ import annotations

from collections.abc import Callable

from pipeline.config import Cache
from storage.errors import ConfigError
from workers.cache.frequency import RecentlyFrequent
from workers.cache.policy import KeepNothing, Policy, WindowThenOldest


def _lru(units: int, settings: Cache) -> Policy:
    return WindowThenOldest(units, settings.window)


def _lrfu(units: int, settings: Cache) -> Policy:
    """Half-life 0: the least recently used leaves first."""
    if not settings.half_life:
        return _lru(units, settings)
    return RecentlyFrequent(units, settings.window, settings.half_life)


POLICIES: dict[str, Callable[[int, Cache], Policy]] = {"lrfu": _lrfu, "lru": _lru}


def make_policy(units: int, settings: Cache) -> Policy:
    """One layer's policy of the configuration, for so many units. Raises ConfigError for an unknown name."""
    if not settings.keep:
        return KeepNothing()
    if settings.policy not in POLICIES:
        raise ConfigError(f"cache.policy is one of {', '.join(POLICIES)}, not {settings.policy!r}")
    return POLICIES[settings.policy](units, settings)
