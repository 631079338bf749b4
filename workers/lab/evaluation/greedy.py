"""`python -m workers.lab.evaluation.greedy`: where our greedy text leaves llama.cpp's, on the same weights.

llama.cpp writes first, in a process of its own. Then one pass of ours over each prompt and what it wrote
tells what we would have written: up to the first difference the two texts are the same. There, the distance
of a writer's two likeliest tokens tells how little it takes to turn them round.

llama.cpp rounds what enters a matrix of low bits to 8 bits. With `--rounded` the same is done to
transformers' reading, which tells how far rounding alone leads away.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import torch
import typer
from rich.table import Table
from tokenizers import Tokenizer

from pipeline import program
from pipeline.commands.options import Model
from pipeline.console import tables
from pipeline.cores import thread_count
from pipeline.launch import module_command, module_environment
from pipeline.models.names import configure
from pipeline.serving.chat import ChatTemplate
from pipeline.status import waiting
from storage.errors import FlashringError, UsageError
from storage.gguf.parts import is_gguf
from storage.store import Store
from storage.tokenizer import load_tokenizer
from workers.lab.evaluation.transformers_model import TransformersModel
from workers.lab.offline.dense import DenseModel

PROMPTS = (
    "What is the capital of France?",
    "Tell me a story about a lighthouse.",
    "Explain in simple words why the sky is blue.",
    "Write a short poem about the sea.",
    "How do I make pancakes?",
    "List three things to see in Rome.",
)
TOKENS = 128

Sure = tuple[tuple[int, float], tuple[int, float]]  # the two likeliest tokens and their log-probabilities


Logits = Callable[[list[int]], torch.Tensor]  # of token ids: [tokens, vocabulary]


@dataclass(frozen=True, slots=True)
class Closeness:
    """How near two readers are over the same tokens."""

    agree: int  # tokens of which both hold the same one for the likeliest
    noise: (
        float  # median difference of the gaps between the two likeliest, where both name the same two; nats
    )


@dataclass(frozen=True, slots=True)
class Difference:
    """The first token at which two greedy texts part. Gaps are differences of log-probability, nats."""

    at: int
    theirs: str  # that token
    ours: str
    their_gap: float  # between their two likeliest there
    our_gap: float


@dataclass(frozen=True, slots=True)
class Written:
    """One prompt's texts beside each other."""

    prompt: str
    tokens: int  # that llama.cpp wrote
    first: Difference | None
    llama_cpp: Closeness  # to ours
    rounded: Closeness | None  # transformers' reading with rounded activations, to ours


def main(
    gguf: Annotated[Path, typer.Option(help="The GGUF file that the store was converted from.")],
    model: Model = "",
    prompt: Annotated[
        list[str] | None, typer.Option(help="A prompt of your own; may be repeated.", show_default=False)
    ] = None,
    tokens: Annotated[int, typer.Option(help="Written after each prompt, at most.", min=1)] = TOKENS,
    threads: Annotated[int, typer.Option(help="Threads; 0: one for each CPU.", min=0)] = 0,
    rounded: Annotated[
        bool, typer.Option("--rounded", help="Also how far rounded activations alone lead away.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """The first token at which our greedy text and llama.cpp's differ, prompt by prompt.

    Prompts are asked through the model's chat template where it has one. Needs the extra `peers`.
    """
    if not is_gguf(gguf) or not gguf.is_file():
        raise UsageError(f"there is no GGUF file {gguf}")
    source, _ = configure(model, None, ())
    store = source.open_store()
    texts = prompt or PROMPTS
    asked = _asked(store, texts)
    others: Sequence[Sequence[Sure] | None] = [None] * len(texts)
    with waiting("llama.cpp writes"):
        written = written_by_llama_cpp(gguf, asked, tokens, thread_count(threads))
    with waiting("reading what it wrote"):
        with torch.no_grad(), DenseModel(store, thread_count(threads)) as dense:
            ours = _all_sure(lambda ids: dense.forward([ids])[0], asked, written)
        if rounded:
            reference = TransformersModel.open(gguf)
            reference.round_activations()
            others = _all_sure(reference.logits, asked, written)
    tokenizer = load_tokenizer(store)
    found = [
        Written(
            text,
            len(theirs),
            first_difference(theirs, own, tokenizer),
            closeness(theirs, own),
            None if other is None else closeness(other, own),
        )
        for text, theirs, own, other in zip(texts, written, ours, others, strict=True)
    ]
    if as_json:
        print(json.dumps({"model": store.manifest.name, "prompts": [asdict(one) for one in found]}))
    else:
        tables().print(table(found))


def _asked(store: Store, texts: Sequence[str]) -> list[list[int]]:
    """The prompts' token ids."""
    tokenizer = load_tokenizer(store)
    template = ChatTemplate.of_store(store.path, None)
    if template is None:
        return [tokenizer.encode(text).ids for text in texts]
    return [
        tokenizer.encode(template.render([{"role": "user", "content": text}]), add_special_tokens=False).ids
        for text in texts
    ]


def written_by_llama_cpp(
    file: Path, prompts: Sequence[Sequence[int]], tokens: int, threads: int
) -> list[list[Sure]]:
    """llama.cpp's continuations.

    Raises UsageError where it is not installed, FlashringError where it fails.
    """
    if find_spec("xllamacpp") is None:
        raise UsageError('llama.cpp is not installed: pip install -c constraints.txt -e ".[peers]"')
    with TemporaryDirectory(prefix="flashring-greedy-") as directory:
        asked = Path(directory) / "prompts.json"
        asked.write_text(json.dumps(prompts), encoding="utf-8")
        line = module_command("workers.lab.peers.write_llama_cpp", str(file), str(asked))
        done = subprocess.run(
            [*line, "--tokens", str(tokens), "--threads", str(threads)],
            env=module_environment(),
            capture_output=True,
            text=True,
            check=False,
        )
    if done.returncode:
        words = done.stderr.strip().splitlines() or [f"status {done.returncode}"]
        raise FlashringError(f"llama.cpp failed: {words[-1]}")
    return [
        [((best[0], best[1]), (next_best[0], next_best[1])) for best, next_best in one]
        for one in json.loads(done.stdout)
    ]


def _all_sure(
    logits: Logits, prompts: Sequence[Sequence[int]], written: Sequence[Sequence[Sure]]
) -> list[list[Sure]]:
    return [
        sure(logits, prompt, [best[0] for best, _ in one])
        for prompt, one in zip(prompts, written, strict=True)
    ]


def sure(logits: Logits, prompt: Sequence[int], written: Sequence[int]) -> list[Sure]:
    """A reader's two likeliest at each token after the prompt, those before it being `written`."""
    rows = logits([*prompt, *written[:-1]])[len(prompt) - 1 :]
    likeliest = torch.log_softmax(rows.double(), dim=-1).topk(2, dim=-1)
    return [
        ((ids[0], values[0]), (ids[1], values[1]))
        for ids, values in zip(likeliest.indices.tolist(), likeliest.values.tolist(), strict=True)
    ]


def first_difference(theirs: Sequence[Sure], ours: Sequence[Sure], tokenizer: Tokenizer) -> Difference | None:
    """`ours`: of the same positions as `theirs`, given the tokens that they wrote."""
    for at, (a, b) in enumerate(zip(theirs, ours, strict=True)):
        if a[0][0] != b[0][0]:
            one, other = (tokenizer.decode([best], skip_special_tokens=False) for (best, _), _ in (a, b))
            return Difference(at, one, other, _gap(a), _gap(b))
    return None


def closeness(some: Sequence[Sure], others: Sequence[Sure]) -> Closeness:
    pairs = list(zip(some, others, strict=True))
    gaps = [abs(_gap(a) - _gap(b)) for a, b in pairs if (a[0][0], a[1][0]) == (b[0][0], b[1][0])]
    return Closeness(
        agree=sum(a[0][0] == b[0][0] for a, b in pairs), noise=statistics.median(gaps) if gaps else 0.0
    )


def _gap(one: Sure) -> float:
    return one[0][1] - one[1][1]


def table(found: Sequence[Written]) -> Table:
    """A prompt a row."""
    shown = Table("prompt", "differs at", "llama.cpp", "its gap", "ours", "our gap", "agree", "noise")
    for name in ("rounded agree", "noise"):
        shown.add_column(name)
    for one in found:
        where = ("never", "", "", "", "")
        if one.first is not None:
            first = one.first
            gaps = [f"{gap:.3f}" for gap in (first.their_gap, first.our_gap)]
            where = (str(first.at), repr(first.theirs), gaps[0], repr(first.ours), gaps[1])
        shown.add_row(
            one.prompt, *where, *_words(one.llama_cpp, one.tokens), *_words(one.rounded, one.tokens)
        )
    return shown


def _words(one: Closeness | None, tokens: int) -> tuple[str, str]:
    return ("–", "–") if one is None else (f"{one.agree} of {tokens}", f"{one.noise:.3f}")


def run() -> int:
    """The command line's exit status."""
    return program.single(main)


if __name__ == "__main__":
    sys.exit(run())
