"""Versions of installed packages, ours among them."""

from __future__ import annotations

from importlib import metadata


def version(package: str) -> str:
    """Empty where it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def name_and_version() -> str:
    """`flashring 0.1.0`; without the number where it is not installed."""
    return f"flashring {version('flashring')}".rstrip()
