"""`python -m workers.lab.evaluation.greedy`: where our greedy text leaves llama.cpp's, on the same weights.

llama.cpp writes first, in a process of its own. Then one pass of ours over each prompt and what it wrote tells
what we should have written: up to the first difference the two texts are the same. There, how far a writer's two
likeliest tokens are apart tells how little it takes to turn them round.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
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
from storage.errors import FlashringError, UsageError
from storage.gguf.parts import is_gguf
from storage.store import Store
from storage.tokenizer import load_tokenizer
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


@dataclass(frozen=True, slots=True)
class Written:
    """One prompt's texts beside each other. Gaps are differences of log-probability, nats."""

    prompt: str
    tokens: int  # that llama.cpp wrote
    differs: int | None  # first token that is another one; None: none is
    theirs: str = ""  # that token
    ours: str = ""
    their_gap: float | None = None  # between its two likeliest there
    our_gap: float | None = None
    noise: float = 0.0  # median difference between both writers' gaps, over the tokens before


def main(
    gguf: Annotated[Path, typer.Option(help="The GGUF file that the store was converted from.")],
    model: Model = "",
    prompt: Annotated[
        list[str] | None, typer.Option(help="A prompt of your own; may be repeated.", show_default=False)
    ] = None,
    tokens: Annotated[int, typer.Option(help="Written after each prompt, at most.", min=1)] = TOKENS,
    threads: Annotated[int, typer.Option(help="0: as many as there are CPUs.", min=0)] = 0,
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
    theirs = written_by_llama_cpp(gguf, asked, tokens, thread_count(threads))
    tokenizer = load_tokenizer(store)
    with torch.no_grad(), DenseModel(store, thread_count(threads)) as ours:
        found = [
            compare(text, theirs[i], sure(ours, asked[i], [best[0] for best, _ in theirs[i]]), tokenizer)
            for i, text in enumerate(texts)
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
    """llama.cpp's continuations. Raises UsageError where it is not installed, FlashringError where it fails."""
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


def sure(model: DenseModel, prompt: Sequence[int], written: Sequence[int]) -> list[Sure]:
    """How sure we are of each token after the prompt, those before it being `written`."""
    logits = model.forward([[*prompt, *written[:-1]]])[0, len(prompt) - 1 :]
    likeliest = torch.log_softmax(logits.double(), dim=-1).topk(2, dim=-1)
    return [
        ((ids[0], values[0]), (ids[1], values[1]))
        for ids, values in zip(likeliest.indices.tolist(), likeliest.values.tolist(), strict=True)
    ]


def compare(prompt: str, theirs: Sequence[Sure], ours: Sequence[Sure], tokenizer: Tokenizer) -> Written:
    """`ours`: of the same positions as `theirs`, given the tokens that they wrote."""
    pairs = list(zip(theirs, ours, strict=True))
    differs = next((i for i, (a, b) in enumerate(pairs) if a[0][0] != b[0][0]), None)
    same = pairs[:differs]
    noise = statistics.median(abs(_gap(a) - _gap(b)) for a, b in same) if same else 0.0
    if differs is None:
        return Written(prompt, len(theirs), None, noise=noise)
    a, b = pairs[differs]
    return Written(
        prompt,
        len(theirs),
        differs,
        theirs=tokenizer.decode([a[0][0]], skip_special_tokens=False),
        ours=tokenizer.decode([b[0][0]], skip_special_tokens=False),
        their_gap=_gap(a),
        our_gap=_gap(b),
        noise=noise,
    )


def _gap(one: Sure) -> float:
    return one[0][1] - one[1][1]


def table(found: Sequence[Written]) -> Table:
    """A prompt a row."""
    shown = Table("prompt", "tokens", "differs at", "llama.cpp", "its gap", "ours", "our gap", "noise")
    for one in found:
        where = ("never", "", "", "", "")
        if one.differs is not None:
            where = (
                str(one.differs), repr(one.theirs), f"{one.their_gap:.3f}", repr(one.ours), f"{one.our_gap:.3f}"
            )  # fmt: skip
        shown.add_row(one.prompt, str(one.tokens), *where, f"{one.noise:.3f}")
    return shown


def run() -> int:
    """The command line's exit status."""
    return program.single(main)


if __name__ == "__main__":
    sys.exit(run())
