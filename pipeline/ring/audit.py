"""What an audit counts, by which names compute tells it, and what they say of a generation.

`workers/compute/audit.py` looks; here is what it finds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from typing import Any

from pipeline.ring.counters import of_layer

AUDIT_EVERY = 4  # tokens, with --audit: one layer of every fourth token is checked
# Compute's counters over all layers.
ACTIVE = "audit_active"  # neurons that were active
FOUND = "audit_found"  # those of them that were predicted
SECONDS = "audit_seconds"


@dataclass(frozen=True, slots=True)
class AuditSums:
    """Of a layer's audited tokens, or of all layers'. The counters bear these names."""

    tokens: float
    active: float  # neurons
    missed: float  # active and not predicted
    wrong: float  # predicted and not active
    inactive: float
    magnitude: float  # of all activations
    magnitude_missed: float  # of those that were not predicted
    output: float  # squares of the FFN's true output
    error: float  # squares of its difference from what was computed

    def by_counter(self, layer: int) -> Iterator[tuple[str, float]]:
        """The names of a layer's counters, and by how much each grows."""
        for name, value in asdict(self).items():
            yield audit_counter(layer, name), value

    @classmethod
    def of_layer(cls, layer: int, counter: Callable[[str], float]) -> AuditSums:
        """A layer's sums out of its counters, by name."""
        return cls(**{name: counter(audit_counter(layer, name)) for name in AUDITED})

    @classmethod
    def total(cls, layers: list[AuditSums]) -> AuditSums:
        return cls(**{name: sum(getattr(one, name) for one in layers) for name in AUDITED})


AUDITED = tuple(one.name for one in fields(AuditSums))


def audit_counter(layer: int, name: str) -> str:
    """A layer's counter of what `AuditSums` calls `name`."""
    return of_layer(layer, f"audit_{name}")


@dataclass(frozen=True, slots=True)
class AuditShares:
    """How good the sets were."""

    tokens: int
    active: float  # of all neurons
    false_negatives: float  # of the active neurons
    false_positives: float  # of the inactive neurons
    weighted_recall: float  # of the activations' magnitude
    output_error: float  # norm of the FFN output's error over the norm of the output

    @classmethod
    def of(cls, sums: AuditSums) -> AuditShares:
        return cls(
            tokens=int(sums.tokens),
            active=_ratio(sums.active, sums.active + sums.inactive),
            false_negatives=_ratio(sums.missed, sums.active),
            false_positives=_ratio(sums.wrong, sums.inactive),
            weighted_recall=1.0 - _ratio(sums.magnitude_missed, sums.magnitude),
            output_error=_ratio(sums.error, sums.output) ** 0.5,
        )


@dataclass(frozen=True, slots=True)
class AuditReport:
    """What an audited generation found."""

    whole: AuditShares
    seconds: float  # that the audit took
    layers: dict[int, AuditShares]  # those that were looked at

    @classmethod
    def of(cls, grown: Callable[[str, str], float], layers: int) -> AuditReport:
        """`grown(worker, name)` is a counter's growth."""
        sums = [AuditSums.of_layer(layer, lambda name: grown("compute", name)) for layer in range(layers)]
        return cls(
            whole=AuditShares.of(AuditSums.total(sums)),
            seconds=grown("compute", SECONDS),
            layers={layer: AuditShares.of(one) for layer, one in enumerate(sums) if one.tokens},
        )

    def to_json(self) -> dict[str, Any]:
        return {
            **asdict(self.whole),
            "seconds": self.seconds,
            "layers": [{"layer": layer, **asdict(shares)} for layer, shares in self.layers.items()],
        }

    def describe(self) -> str:
        """One line."""
        whole = self.whole
        return (
            f"[audit of {whole.tokens} layers: {whole.false_negatives:.1%} of the active neurons missed, "
            f"{whole.false_positives:.1%} of the others computed for nothing, recall by magnitude "
            f"{whole.weighted_recall:.2%}, error of the FFN's output {whole.output_error:.2%}]"
        )


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
