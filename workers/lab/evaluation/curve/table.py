"""What was measured of some variants, for people."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from workers.lab.evaluation.curve.measure import Measured


def measured_table(title: str, found: Sequence[Measured]) -> Table:
    """A variant a row."""
    shown = Table(
        title,
        "perplexity",
        "change",
        "KL mean",
        "KL p99",
        "same token",
        "neurons",
        "recall",
        "KB a token",
        "copy, KB",
    )
    for one in found:
        shown.add_row(
            one.variant.name,
            f"{one.perplexity:.3f}",
            one.ratio.beyond(1).percent(),
            f"{one.divergence_mean:.4f}",
            f"{one.divergence_p99:.3f}",
            f"{one.agreement.value:.1%}",
            f"{one.share:.1%}",
            "" if one.variant.scored == "true" or not 0 < one.share < 1 else f"{one.recall:.1%}",
            f"{one.bytes_per_token / 1e3:,.0f}",
            f"{one.memory / 1e3:,.0f}",
        )
    return shown
