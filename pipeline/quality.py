"""Named points on the dial between exact and fast; docs/quality.md has what each costs and keeps."""

from __future__ import annotations

from storage.errors import UsageError

POINTS: dict[str, tuple[str, ...]] = {
    "exact": ("predictor.kind=all",),
    "high": ("predictor.threshold=-1.0",),
    "fast": ("predictor.threshold=0.5",),
}


def quality_settings(name: str) -> tuple[str, ...]:
    """Settings of a named point, none for an empty name. Raises UsageError."""
    if name and name not in POINTS:
        raise UsageError(f"--quality is one of {', '.join(POINTS)}, not {name!r}")
    return POINTS.get(name, ())
