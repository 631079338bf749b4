"""`python -m workers.lab.evaluation.devices`: how many greedy tokens two devices have in common.

A ring on the CPU's kernels writes. A ring on the other device then follows that text: at each token it says
what it would have written behind the same ones. Where that is another token, the distance of the two in the
other device's log-probabilities tells how little it takes to turn them round: below a bound it is a near-tie,
which other sums of the same products may decide either way. The noise is how far the two devices' log-
probabilities of the written tokens are apart.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise
from typing import Annotated, Any

import typer
from rich.table import Table

from pipeline import program
from pipeline.commands.options import Bits, Device, DeviceMemory, Model, Settings
from pipeline.config import Values
from pipeline.console import tables
from pipeline.models.names import configure
from pipeline.planner.divide import plan
from pipeline.ring.generation import GenerationParams
from pipeline.ring.sampling import Sampling
from pipeline.ring.session import Session
from pipeline.status import waiting
from storage.errors import UsageError
from storage.store import Store
from storage.tokenizer import load_tokenizer
from workers.lab.bench.job import TEXT

PROMPTS, PROMPT_TOKENS, TOKENS = 6, 32, 64
TIE = 0.02  # nats

Follow = Callable[[Sequence[int]], tuple[list[int], list[float]]]


@dataclass(frozen=True, slots=True)
class Difference:
    """A token that the other device would not have written."""

    at: int  # of the text
    margin: float  # between the other device's token and the text's, in its log-probabilities, nats


@dataclass(frozen=True, slots=True)
class Followed:
    """A text, and what the other device made of it."""

    tokens: int
    differences: tuple[Difference, ...]
    noise: tuple[float, ...]  # of each token, nats


@dataclass(frozen=True, slots=True)
class Agreement:
    """All texts of a model."""

    model: str
    device: str
    tie: float  # margins below it are near-ties, nats
    texts: tuple[Followed, ...]

    @property
    def tokens(self) -> int:
        return sum(text.tokens for text in self.texts)

    @property
    def margins(self) -> list[float]:
        return [one.margin for text in self.texts for one in text.differences]

    @property
    def equal(self) -> int:
        return self.tokens - len(self.margins)

    @property
    def near(self) -> int:
        """Differences that are near-ties."""
        return sum(margin < self.tie for margin in self.margins)

    @property
    def noise(self) -> list[float]:
        return [one for text in self.texts for one in text.noise]

    def to_json(self) -> dict[str, Any]:
        noise = {"median": statistics.median(self.noise), "largest": max(self.noise)}
        counts = {"tokens": self.tokens, "equal": self.equal, "near": self.near}
        return {**asdict(self), **counts, "largest_margin": max(self.margins, default=0.0), "noise": noise}


def follow(tokens: Sequence[int], logprobs: Sequence[float], other: Follow) -> Followed:
    """`other(forced)` writes as many tokens, the first of them forced, with their log-probabilities.

    It is asked once, and once more for each difference.
    """
    found = other(())
    places: list[int] = []
    answers = [found]
    while True:
        rest = range(places[-1] + 1 if places else 0, len(tokens))
        place = next((at for at in rest if found[0][at] != tokens[at]), None)
        if place is None:
            break
        places.append(place)
        found = other(tokens[: place + 1])
        answers.append(found)
    differences = tuple(
        Difference(place, before[1][place] - after[1][place])
        for place, (before, after) in zip(places, pairwise(answers), strict=True)
    )
    noise = tuple(abs(one - two) for one, two in zip(found[1], logprobs, strict=True))
    return Followed(len(tokens), differences, noise)


def prompts_of(store: Store, count: int) -> list[list[int]]:
    """Pieces of a text, in the model's tokens. Raises UsageError where it is too short."""
    tokenizer = load_tokenizer(store)
    start = tokenizer.encode("").ids  # what a text begins with
    ids = tokenizer.encode(TEXT.read_text(encoding="utf-8"), add_special_tokens=False).ids
    if len(ids) < count * PROMPT_TOKENS:
        raise UsageError(f"{TEXT} has no {count} prompts of {PROMPT_TOKENS} tokens for this model")
    step = len(ids) // count
    return [[*start, *ids[number * step :][:PROMPT_TOKENS]] for number in range(count)]


@dataclass(frozen=True, slots=True)
class Wanted:
    """What is measured."""

    model: str  # as the command line has it
    settings: Sequence[str]  # section.key=value, of both rings
    bits: int | None
    device: str
    device_memory: str
    prompts: int
    tokens: int  # of each text
    tie: float  # nats


def measure(wanted: Wanted) -> Agreement:
    """Let both devices write. Raises UsageError and ConfigError."""
    store, session = _opened(wanted, "cpu")
    with session:
        prompts = prompts_of(store, wanted.prompts)
        written = [_write(session, prompt, wanted.tokens, ()) for prompt in prompts]
    _, session = _opened(wanted, wanted.device)
    with session:
        texts = tuple(
            follow(*text, partial(_write, session, prompt, wanted.tokens))
            for prompt, text in zip(prompts, written, strict=True)
        )
    name = store.manifest.name + ("" if wanted.bits is None else f", {wanted.bits} bits")
    return Agreement(name, wanted.device, wanted.tie, texts)


def _opened(wanted: Wanted, device: str) -> tuple[Store, Session]:
    compute = {"device": device, "device_memory": wanted.device_memory or None}
    if device == "cpu":
        compute["device_memory"] = None
    values: Values = {"model": {"bits": wanted.bits}, "compute": compute}
    source, config = configure(wanted.model, None, wanted.settings, values)
    store = source.open_store()
    report = plan(store, config)
    return store, Session(store, report.config, report.plan)


def _write(
    session: Session, prompt: Sequence[int], count: int, forced: Sequence[int]
) -> tuple[list[int], list[float]]:
    params = GenerationParams(count, Sampling(temperature=0.0), ignore_eos=True, forced=tuple(forced))
    for _ in session.generate(prompt, params):
        pass
    assert session.last is not None
    return session.last.tokens, session.last.logprobs


def main(
    model: Model = "",
    bits: Bits = None,
    device: Device = "torch-cpu",
    device_memory: DeviceMemory = "",
    prompts: Annotated[int, typer.Option(help="Prompts, pieces of one text.", min=1)] = PROMPTS,
    tokens: Annotated[int, typer.Option(help="Written after each.", min=1)] = TOKENS,
    tie: Annotated[float, typer.Option(help="Below this margin a difference is a near-tie, nats.")] = TIE,
    settings: Settings = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """How many greedy tokens a device has in common with the CPU's kernels, and how near the others are."""
    if device == "cpu":
        raise UsageError("--device cpu is what the others are compared with")
    with waiting("measuring"):
        found = measure(Wanted(model, settings or (), bits, device, device_memory, prompts, tokens, tie))
    if as_json:
        print(json.dumps(found.to_json()))
    else:
        tables().print(table(found))


def table(found: Agreement) -> Table:
    shown = Table(
        "model", "device", "tokens", "equal", "near-ties", "others", "largest margin", "noise", "most"
    )
    others = found.tokens - found.equal - found.near
    shown.add_row(
        found.model,
        found.device,
        *map(str, (found.tokens, found.equal, found.near, others)),
        f"{max(found.margins, default=0.0):.2g}",
        f"{statistics.median(found.noise):.2g}",
        f"{max(found.noise):.2g}",
    )
    return shown


def run() -> int:
    """The command line's exit status."""
    return program.single(main)


if __name__ == "__main__":
    sys.exit(run())
