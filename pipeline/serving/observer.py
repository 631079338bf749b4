"""What the serving process counts. `prometheus.py` turns it into a metrics page."""

from __future__ import annotations

from collections import Counter

from pipeline.serving.client_messages import Done


class Observer:
    """Plain counters. Only touched on the event loop; subclasses add histograms."""

    def __init__(self) -> None:
        self.requests: Counter[str] = Counter()  # by outcome: stop, length, cancelled, gone, error codes
        self.generated_tokens = 0
        self.prompt_tokens = 0
        self.cached_tokens = 0
        self.ring_deaths = 0
        self.last_death = ""
        self.malformed_frames = 0
        self.dropped_clients = 0  # gone, or not reading, while a request was open

    def refused(self) -> None:
        """A request met a full queue."""
        self.requests["queue-full"] += 1

    def token(self, seconds: float, *, first: bool) -> None:
        """A token came `seconds` after the one before, or, if `first`, after the request."""
        self.generated_tokens += 1

    def answered(self, done: Done, seconds: float) -> None:
        """A request was answered, `seconds` after its receipt."""
        self.prompt_tokens += done.prompt_tokens
        self.cached_tokens += done.cached_tokens

    def ended(self, outcome: str) -> None:
        self.requests[outcome] += 1

    def ring_died(self, reason: str) -> None:
        self.ring_deaths += 1
        self.last_death = reason

    def values(self) -> dict[str, float]:
        """All counters by name."""
        return {
            **{f"requests.{outcome}": float(count) for outcome, count in self.requests.items()},
            "generated_tokens": float(self.generated_tokens),
            "prompt_tokens": float(self.prompt_tokens),
            "cached_tokens": float(self.cached_tokens),
            "ring_deaths": float(self.ring_deaths),
            "malformed_frames": float(self.malformed_frames),
            "dropped_clients": float(self.dropped_clients),
        }
