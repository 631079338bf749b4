"""`python -m workers.lab.bench.drafts --model MODEL`: what several tokens a step bring, and what they cost.

Three texts are written with drafts and without, in turns, each time by a ring of its own: a quotation and a
changed program, which copy from their prompts, greedily; and a story that is sampled and repeats little. The
texts must be the same, token by token and in their log-probabilities, or the program fails. Prints one JSON
object: medians over the turns of milliseconds and bytes a token, and what became of the drafts.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from pipeline import ending
from pipeline.models.names import configure
from pipeline.planner.divide import plan
from pipeline.ring.generation import GenerationParams
from pipeline.ring.sampling import Sampling
from pipeline.ring.session import Session
from pipeline.ring.summary import Summary
from pipeline.serving.chat import ChatTemplate
from pipeline.status import waiting
from storage.errors import FlashringError

_QUOTED: Final = (
    "The lighthouse at Cape Wrath was built in 1828 by Robert Stevenson. Its tower is twenty metres high and "
    "stands on a cliff above the sea. For a hundred and seventy years three keepers lived there with their "
    "families, and in winter no boat could land for weeks. In 1998 the lamp was made automatic, and the last "
    "keeper left on a grey morning in March. Today a café in the old engine room serves tea to walkers. The "
    "walk from the ferry takes a day, there is no road for cars, and whoever comes late sleeps on the floor "
    "of the café, with a dog called Daisy. The owner has lived alone since his wife fell ill one December "
    "and could not come home through the snow. He says that the wind is his clock and the sea his newspaper."
)
_PROGRAM: Final = """def average(numbers):
    total = 0
    for number in numbers:
        total = total + number
    return total / len(numbers)


def spread(numbers):
    middle = average(numbers)
    total = 0
    for number in numbers:
        total = total + (number - middle) ** 2
    return total / len(numbers)


def largest(numbers):
    found = numbers[0]
    for number in numbers:
        if number > found:
            found = number
    return found
"""


@dataclass(frozen=True, slots=True)
class Text:
    """What is to be written."""

    name: str
    question: str
    sampling: Sampling


TEXTS: Final = (
    Text("quotation", f"Repeat this text word for word:\n\n{_QUOTED}", Sampling()),
    Text("program", f"Write this program again, with `items` for `numbers`:\n\n{_PROGRAM}", Sampling()),
    Text("story", "Write a long story about a fox who learns to sail.", Sampling(1.0, 0, 0.95, 1)),
)


@dataclass(frozen=True, slots=True)
class Written:
    """One text, once."""

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    summary: Summary

    @property
    def milliseconds(self) -> float:
        """A token."""
        return 1e3 * self.summary.seconds.decode / max(1, len(self.tokens) - 1)


def write_all(model: str, settings: list[str], tokens: int, kind: str) -> dict[str, Written]:
    """Every text by one ring, which drafts as `kind` says."""
    source, config = configure(model, None, settings, {"drafts": {"kind": kind}})
    store = source.open_store()
    report = plan(store, config)
    template = ChatTemplate.of_store(store.path)
    found = {}
    with Session(store, report.config, report.plan) as session:
        for text in TEXTS:
            asked = f"{text.question}\n\n"
            if template is not None:
                asked = template.render([{"role": "user", "content": text.question}])
            prompt = session.encode(asked, special=template is None)
            for _ in session.generate(prompt, GenerationParams(tokens, text.sampling)):
                pass
            assert session.last is not None
            last = session.last
            found[text.name] = Written(tuple(last.tokens), tuple(last.logprobs), session.summary())
    return found


def compare(alone: list[dict[str, Written]], together: list[dict[str, Written]]) -> list[dict[str, Any]]:
    """One row a text. Raises FlashringError where drafts have changed one."""
    rows = []
    for text in TEXTS:
        one, other = [turn[text.name] for turn in alone], [turn[text.name] for turn in together]
        if len({(each.tokens, each.logprobs) for each in (*one, *other)}) > 1:
            raise FlashringError(f"the {text.name} is another with drafts than without")
        rows.append({"text": text.name, "tokens": len(one[0].tokens), **_costs(one, other)})
    return rows


def _costs(one: list[Written], other: list[Written]) -> Mapping[str, Any]:
    drafts = other[-1].summary.drafts
    milliseconds = [statistics.median(each.milliseconds for each in turns) for turns in (one, other)]
    read = [
        statistics.median(each.summary.flash.bytes_per_token for each in turns) / 1e6
        for turns in (one, other)
    ]
    return {
        "milliseconds": [round(each, 2) for each in milliseconds],
        "megabytes": [round(each, 3) for each in read],
        "quicker": round(milliseconds[0] / milliseconds[1], 3),
        "fewer_bytes": round(read[0] / read[1], 3) if read[1] else None,
        "steps": drafts.steps,
        "drafted": drafts.drafted,
        "accepted": drafts.accepted,
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m workers.lab.bench.drafts", description=__doc__)
    parser.add_argument("--model", default="", help="as the main command's")
    parser.add_argument("--tokens", type=int, default=150, help="of each text, at most")
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--kind", default="auto", help="of drafts: auto or lookup")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", dest="settings")
    given = parser.parse_args()
    turns: dict[str, list[dict[str, Written]]] = {"off": [], given.kind: []}
    for number in range(given.turns):
        for kind in list(turns)[:: 1 if number % 2 == 0 else -1]:
            with waiting(f"turn {number + 1} of {given.turns}, drafts {kind}"):
                turns[kind].append(write_all(given.model, given.settings, given.tokens, kind))
    print(json.dumps({"kind": given.kind, "texts": compare(turns["off"], turns[given.kind])}, indent=2))


if __name__ == "__main__":
    sys.exit(ending.exit_status(main))
