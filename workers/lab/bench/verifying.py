"""`python -m workers.lab.bench.verifying --model MODEL`: what it costs to compare units as they are read.

One text is written with `storage.verify` off, sample and always, in turns, each time by a ring of its own.
Prints one JSON object: of each, medians over the turns of milliseconds a token and of seconds a prompt,
megabytes that a token reads, and units that were compared.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from typing import Any, Final

from pipeline import ending
from pipeline.models.names import configure
from pipeline.planner.divide import plan
from pipeline.ring.generation import GenerationParams
from pipeline.ring.session import Session
from pipeline.status import waiting
from storage.errors import FlashringError

MODES: Final = ("off", "sample", "always")
PROMPT: Final = "Once upon a time there was a little bear who lived in a house made of honey and"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", default="", help="a model as of run.py; without: the built-in one")
    parser.add_argument("--memory", default="", help="budget, as of run.py")
    parser.add_argument("--tokens", type=int, default=64, help="of one text")
    parser.add_argument("--turns", type=int, default=3, help="texts of each kind")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", dest="settings")
    given = parser.parse_args()
    with waiting("measuring"):
        found = measure(**vars(given))
    print(json.dumps(found, indent=2))
    return 0


def measure(*, model: str, memory: str, tokens: int, turns: int, settings: list[str]) -> dict[str, Any]:
    """Raises FlashringError where the texts differ."""
    found: dict[str, list[dict[str, float]]] = {mode: [] for mode in MODES}
    texts = set()
    for turn in range(turns):
        for mode in MODES if turn % 2 == 0 else reversed(MODES):
            text, figures = _one(model, memory, tokens, [*settings, f"storage.verify={mode}"])
            texts.add(text)
            found[mode].append(figures)
    if len(texts) > 1:
        raise FlashringError("the texts differ")
    return {
        mode: {name: round(statistics.median(one[name] for one in runs), 4) for name in runs[0]}
        for mode, runs in found.items()
    }


def _one(model: str, memory: str, tokens: int, settings: list[str]) -> tuple[str, dict[str, float]]:
    values = {"memory": {"budget": memory or None}}
    source, config = configure(model, None, settings, values)
    store = source.open_store()
    report = plan(store, config)
    with Session(store, report.config, report.plan) as session:
        text = "".join(session.generate(PROMPT, GenerationParams(tokens, ignore_eos=True)))
        assert session.last is not None
        finished, reader = session.last.finished, session.ring.stats()["prefetcher"]
    assert finished is not None
    return text, {
        "ms_per_token": finished.decode_seconds / tokens * 1e3,
        "prompt_seconds": finished.prefill_seconds,
        "mb_per_token": reader["decode_bytes"] / tokens / 1e6,
        "compared": reader["verified"],
        "prefetcher_ms_per_token": reader["cpu_seconds"] / tokens * 1e3,
    }


if __name__ == "__main__":
    sys.exit(ending.exit_status(main))
