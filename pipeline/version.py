"""Which flashring this is."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version


def name_and_version() -> str:
    """`flashring 0.1.0`; without the number where the package is not installed."""
    try:
        return f"flashring {version('flashring')}"
    except PackageNotFoundError:
        return "flashring"
