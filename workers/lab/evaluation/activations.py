"""`python -m workers.lab.evaluation.activations`: what rounding of activations costs and saves.

Rows in eight and four bits are multiplied with activations that are rounded to whole numbers, unless
`compute.activations` is `exact`. Here a store in few bits reads one text both ways, token by token, with
every unit in memory, and the divergence of the one from the other is measured.
"""

from __future__ import annotations

from workers import kernels  # isort: skip  # before torch, for OpenMP's settings

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import typer

from pipeline import program
from pipeline.commands.options import Model
from pipeline.cores import thread_count
from pipeline.models.names import configure
from pipeline.status import waiting
from storage.errors import UsageError
from storage.store import Store
from storage.tokenizer import load_tokenizer
from workers.compute.blocks import run as run_layers
from workers.compute.cpu.device import CpuDevice
from workers.compute.device import Bytes
from workers.compute.weights import Weights
from workers.lab.evaluation.evaluate import chunks
from workers.lab.evaluation.tasks import read_text
from workers.routing import Ids

_LENGTH = 256  # tokens of a chunk


@dataclass(frozen=True, slots=True)
class Cost:
    """Of rounded activations beside those as they are."""

    bits: int | None  # None: as the model's file has them
    tokens: int
    perplexity_exact: float
    perplexity_rounded: float
    divergence_mean: float  # Kullback–Leibler, nats a token, from exact
    divergence_largest: float
    agreement: float  # share of tokens whose likeliest next token is the same
    ms_exact: float  # of a token, median
    ms_rounded: float


class _Model:
    """A store in memory, which computes one token after the other, with activations of one kind."""

    def __init__(self, weights: Weights, units: Sequence[Bytes], threads: int, exact: bool) -> None:
        """`units`: of every layer, all of them."""
        self._architecture = weights.architecture
        self._units = units
        self._exact = exact
        kernels.ACTIVATIONS.exact = (
            exact  # a device takes it over when it is made, and its FFNs when they are
        )
        self._device = CpuDevice(weights, _LENGTH, threads)

    def announce(self, index: int, hidden: Any) -> None:
        """Nobody listens."""

    def routed(self, index: int, ids: Ids) -> None:
        """Nobody listens."""

    def ffn(self, index: int, ffn_input: Any) -> Any:
        ffn, units = self._device.ffn(index, ffn_input), self._units[index]
        ids = np.arange(units.shape[0], dtype=np.int32)
        ffn.add(ids, ids, units)
        ffn.close()
        return ffn.finish()

    def step(self, position: int, token: int) -> tuple[npt.NDArray[np.float64], float]:
        """Log-probabilities of what follows, and seconds."""
        kernels.ACTIVATIONS.exact = self._exact
        started = time.perf_counter()
        self._device.begin(position, 1, every=False)
        x = run_layers(self._architecture, self._device, self._device.embed(np.array([token])), self)
        logits = self._device.logits(x)[0]
        took = time.perf_counter() - started
        shifted = logits.astype(np.float64) - logits.max()
        return shifted - np.log(np.exp(shifted).sum()), took

    def close(self) -> None:
        self._device.close()


def compare(store: Store, sequences: Sequence[Sequence[int]], threads: int, bits: int | None) -> Cost:
    """Both ways by turns, chunk by chunk; each has keys and values of its own."""
    weights, units = Weights(store), [store.read_layer(index) for index in range(len(store.layout.layers))]
    models = [_Model(weights, units, threads, exact) for exact in (True, False)]
    nats: dict[bool, list[float]] = {True: [], False: []}
    seconds: dict[bool, list[float]] = {True: [], False: []}
    divergences, same = [], 0
    try:
        for sequence in sequences:
            reference: list[npt.NDArray[np.float64]] = []
            for exact, model in zip((True, False), models, strict=True):
                for position, (token, following) in enumerate(pairwise(sequence)):
                    logs, took = model.step(position, token)
                    nats[exact].append(-float(logs[following]))
                    seconds[exact].append(took)
                    if exact:
                        reference.append(logs)
                        continue
                    true = reference[position]
                    divergences.append(float(np.exp(true) @ (true - logs)))
                    same += int(true.argmax() == logs.argmax())
    finally:
        kernels.ACTIVATIONS.exact = False
        for model in models:
            model.close()
    return Cost(
        bits=bits,
        tokens=len(divergences),
        perplexity_exact=float(np.exp(np.mean(nats[True]))),
        perplexity_rounded=float(np.exp(np.mean(nats[False]))),
        divergence_mean=float(np.mean(divergences)),
        divergence_largest=float(np.max(divergences)),
        agreement=same / len(divergences),
        ms_exact=1000 * float(np.median(seconds[True])),
        ms_rounded=1000 * float(np.median(seconds[False])),
    )


def main(
    text: Annotated[Path, typer.Option(help="A text whose perplexity is wanted; may be .xz.")],
    model: Model = "",
    tokens: Annotated[int, typer.Option(help="Tokens of the text.", min=2)] = 2000,
    threads: Annotated[int, typer.Option(help="Threads; 0: one for each CPU.", min=0)] = 0,
) -> None:
    """Perplexity, divergence and time of rounded activations beside exact ones, in eight and four bits."""
    source, _ = configure(model, None, ())
    if source.store is not None:
        raise UsageError("give a checkpoint or a GGUF file: what is compared is converted from its weights")
    for bits in (8, 4) if source.file is None else (None,):
        store = replace(source, bits=bits).open_store()
        with waiting("measuring"):
            sequences, _ = chunks(load_tokenizer(store), read_text(text), _LENGTH, tokens)
            found = compare(store, sequences, thread_count(threads), bits)
        print(json.dumps(asdict(found)), flush=True)


def run() -> int:
    """The command line's exit status."""
    return program.single(main)


if __name__ == "__main__":
    sys.exit(run())
