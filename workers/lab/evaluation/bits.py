"""`python -m workers.lab.evaluation.bits`: what eight and four bits cost, beside the weights as they are.

Every number of bits is a store of its own, converted from one checkpoint. All score the same chunks of a
text, every neuron computed, widened to float32: what differs is the rounding of the weights alone. Beside
ours stand the same weights rounded as GGUF's blocks are, by the `gguf` package.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated

import numpy as np
import numpy.typing as npt
import torch
import typer
from gguf.constants import GGMLQuantizationType
from gguf.quants import dequantize, quantize
from rich.table import Table
from safetensors.torch import load_file, save_file

from pipeline import program
from pipeline.commands.options import Model
from pipeline.console import say, tables
from pipeline.cores import thread_count
from pipeline.models.names import configure
from pipeline.models.stores import Source
from pipeline.status import waiting
from storage.convert import convert
from storage.errors import UsageError
from storage.rounding import RoundingCost, write_cost
from storage.store import Store
from storage.tokenizer import load_tokenizer
from workers.lab.evaluation.evaluate import LONGEST_CHUNK, chunks
from workers.lab.evaluation.statistics import Estimate, proportion, ratio_of_perplexities
from workers.lab.evaluation.tasks import read_text
from workers.lab.offline.dense import DenseModel

OURS = {"8 bits": 8, "4 bits": 4}  # rows, and their bits
_AT_ONCE = 8  # chunks
_BLOCK = 32  # values; matrices whose rows are no whole blocks stay as they are
# What GGUF has of the same size: name, and its types of FFN matrices and of all others.
BLOCKS = {"GGUF Q4_1, others Q8_0": ("Q4_1", "Q8_0"), "GGUF Q8_0": ("Q8_0", "Q8_0")}
_FFN = ("fc1", "fc2", "mlp.")  # of the names of FFN matrices in the families that are compared here
_ROUTER = ".mlp.gate.weight"  # which files keep in float32


@dataclass(frozen=True, slots=True)
class Rounded:
    """One rounding of the weights against the weights as they are."""

    name: str
    bytes: int  # of the store
    perplexity: float
    ratio: Estimate  # of perplexities
    divergence_mean: float  # Kullback–Leibler, nats a token, from the weights as they are
    divergence_p99: float
    agreement: Estimate  # share of tokens whose likeliest next token is the same


@dataclass(slots=True)
class _Scores:
    """Of one store, chunk by chunk."""

    nats: list[float]
    divergences: list[npt.NDArray[np.float64]]
    agreeing: int = 0


def main(
    text: Annotated[Path, typer.Option(help="A text whose perplexity is wanted; may be .xz.")],
    model: Model = "",
    tokens: Annotated[int, typer.Option(help="Tokens of the text; 0: all.", min=0)] = 0,
    seed: Annotated[int, typer.Option(help="Seed of the bootstrap.", min=0)] = 0,
    threads: Annotated[int, typer.Option(help="Threads; 0: one for each CPU.", min=0)] = 0,
    save: Annotated[
        bool,
        typer.Option("--save", help="Keep the cost in the stores, which tell it at start."),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Perplexity, divergence and agreement of eight and four bits, beside GGUF's blocks of as many."""
    source, _ = configure(model, None, ())
    if source.store is not None or source.file is not None:
        raise UsageError("give a checkpoint: what is compared is converted from its weights")
    with _stores(source) as stores:
        with waiting("measuring"):
            found, count = compare(stores, read_text(text), tokens, seed, thread_count(threads))
        if save:
            _save(stores, found, count, text.name)
    if as_json:
        shown = {"model": source.name, "tokens": count, "rows": [asdict(one) for one in found]}
        print(json.dumps(shown))
    else:
        tables().print(table(found, count))


@contextmanager
def _stores(source: Source) -> Iterator[dict[str, Store]]:
    """The weights as they are, then every rounding of them."""
    checkpoint = source.checkpoint()
    with tempfile.TemporaryDirectory(prefix="flashring-bits-") as directory:
        stores = {f"{bits} bits": replace(source, bits=bits).open_store() for bits in (16, *OURS.values())}
        for name, (ffn, others) in BLOCKS.items():
            say(f"rounding {source.name} to {name}")
            written = Path(directory) / f"{ffn}-{others}"
            with waiting(f"rounding {source.name} to {name}"):
                _round_as_gguf(checkpoint, written, ffn, others)
            stores[name] = convert(written, written.with_suffix(".store"), name=name)
        yield stores


def _round_as_gguf(checkpoint: Path, out: Path, ffn: str, others: str) -> None:
    """A copy of a checkpoint with float32 matrices that hold what blocks of these types would."""
    shutil.copytree(checkpoint, out, ignore=shutil.ignore_patterns("*.safetensors*", "*.bin"))
    for number, shard in enumerate(sorted(checkpoint.glob("*.safetensors"))):
        tensors = {}
        for name, tensor in load_file(shard).items():
            kind = ffn if any(part in name for part in _FFN) else others
            values = tensor.float()
            tensors[name] = values if name.endswith(_ROUTER) else _rounded(values, kind)
        save_file(tensors, out / f"model-{number}.safetensors", {"format": "pt"})
    _index(out)


def _index(out: Path) -> None:
    """Name the shards as checkpoints do: one file, or an index of several."""
    shards = sorted(out.glob("model-*.safetensors"))
    if len(shards) == 1:
        shards[0].rename(out / "model.safetensors")
        return
    where = {name: shard.name for shard in shards for name in load_file(shard)}
    (out / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))


def _rounded(tensor: torch.Tensor, kind: str) -> torch.Tensor:
    if tensor.ndim != 2 or tensor.shape[1] % _BLOCK:
        return tensor
    wanted = GGMLQuantizationType[kind]
    return torch.from_numpy(np.array(dequantize(quantize(tensor.numpy(), wanted), wanted), np.float32))


def compare(
    stores: dict[str, Store], text: str, tokens: int, seed: int, threads: int
) -> tuple[list[Rounded], int]:
    """Every store against the first, on the text's first `tokens`, 0: all; also the number of tokens."""
    first, *_ = stores.values()
    length = min(LONGEST_CHUNK, first.architecture.max_positions)
    sequences, _ = chunks(load_tokenizer(first), text, length, tokens or None)
    scores = {name: _Scores([], []) for name in stores}
    with torch.no_grad(), ExitStack() as opened:
        models = {name: opened.enter_context(DenseModel(store, threads)) for name, store in stores.items()}
        for batch in _batches(sequences):
            _score(models, batch, scores)
    counts = np.array([len(sequence) - 1 for sequence in sequences])
    base, *_ = scores.values()
    found = [_summed(name, stores[name], one, base, counts, seed) for name, one in scores.items()]
    return found, int(counts.sum())


def _save(stores: dict[str, Store], found: Iterable[Rounded], tokens: int, text: str) -> None:
    for one in found:
        if one.name in OURS:
            cost = RoundingCost(OURS[one.name], one.ratio.value - 1, tokens, text)
            write_cost(stores[one.name], cost)


def _batches(sequences: Sequence[list[int]]) -> Iterator[list[list[int]]]:
    """Sequences of one length, some at a time, in their order: a layer is widened once for all of them."""
    batch: list[list[int]] = []
    for sequence in sequences:
        if batch and (len(batch) == _AT_ONCE or len(sequence) != len(batch[0])):
            yield batch
            batch = []
        batch.append(sequence)
    if batch:
        yield batch


def _score(models: dict[str, DenseModel], batch: list[list[int]], scores: dict[str, _Scores]) -> None:
    """Add some chunks to every store's scores; the first model is what the others are compared with."""
    reference: torch.Tensor | None = None
    tokens = torch.tensor(batch)
    for name, model in models.items():
        logs = torch.log_softmax(model.forward(tokens[:, :-1].numpy()).double(), dim=-1)
        reference = logs if reference is None else reference
        one = scores[name]
        one.nats += (-logs.gather(2, tokens[:, 1:, None]).sum(dim=(1, 2))).tolist()
        one.divergences.append((reference.exp() * (reference - logs)).sum(dim=-1).flatten().numpy())
        one.agreeing += int((logs.argmax(dim=-1) == reference.argmax(dim=-1)).sum())


def _summed(
    name: str, store: Store, one: _Scores, base: _Scores, counts: npt.NDArray[np.int64], seed: int
) -> Rounded:
    nats, divergences = np.array(one.nats), np.concatenate(one.divergences)
    return Rounded(
        name=name,
        bytes=sum(entry.bytes for entry in store.manifest.files.values()),
        perplexity=float(np.exp(nats.sum() / counts.sum())),
        ratio=ratio_of_perplexities(nats, np.array(base.nats), counts, seed),
        divergence_mean=float(divergences.mean()),
        divergence_p99=float(np.quantile(divergences, 0.99)),
        agreement=proportion(one.agreeing, int(counts.sum())),
    )


def table(found: Iterable[Rounded], count: int) -> Table:
    shown = Table(f"{count:,} tokens", "perplexity", "change", "KL mean", "KL p99", "same next token")
    for one in found:
        shown.add_row(
            one.name,
            f"{one.perplexity:.4f}",
            one.ratio.beyond(1).percent(),
            f"{one.divergence_mean:.5f}",
            f"{one.divergence_p99:.4f}",
            f"{one.agreement.value:.2%}",
        )
    return shown


def run() -> int:
    """The command line's exit status."""
    return program.single(main)


if __name__ == "__main__":
    sys.exit(run())
