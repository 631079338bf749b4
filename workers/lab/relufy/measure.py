"""What came of a run, on held-out text: exact zeros and dead neurons of every layer, and perplexity."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from storage.errors import UsageError
from workers.lab.evaluation.statistics import Estimate, ratio_of_perplexities
from workers.lab.relufy.network import Network

REPORT = "report.json"


@dataclass(frozen=True, slots=True)
class Measured:
    """Of one checkpoint, every row of a text for itself."""

    nats: list[float]  # of rows, summed
    tokens: int  # of a row
    zeros: list[float]  # share of each layer's activations; of a smooth activation few or none
    dead: list[float]  # share of each layer's neurons that no token made active

    @property
    def perplexity(self) -> float:
        return float(np.exp(np.mean(self.nats) / self.tokens))

    def beside(self, other: Measured, seed: int = 0) -> Estimate:
        """The change of perplexity, of the same rows."""
        counts = np.full(len(self.nats), self.tokens)
        return ratio_of_perplexities(np.array(self.nats), np.array(other.nats), counts, seed).beyond(1)


@dataclass(frozen=True, slots=True)
class Report:
    """A run's own, kept in its directory."""

    text: str
    original: Measured
    tuned: Measured

    def write(self, out: Path) -> None:
        (out / REPORT).write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, out: Path) -> Report:
        """Raises UsageError for a run that has none."""
        path = out / REPORT
        if not path.is_file():
            raise UsageError(f"{out} has no {REPORT}: let that run end first")
        data = json.loads(path.read_text(encoding="utf-8"))
        return cls(data["text"], Measured(**data["original"]), Measured(**data["tuned"]))


@torch.no_grad()
def measure(
    checkpoint: Path,
    rows: npt.NDArray[np.int64],
    device: str,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Measured:
    """Of a checkpoint in float32, on `rows` [n, length + 1]."""
    network = Network.open(checkpoint, device)
    layers = len(network.ffns)
    zeros, counts = torch.zeros(layers), torch.zeros(layers)
    alive: list[Tensor | None] = [None] * layers
    hooks = [
        activation.register_forward_hook(_watch(index, zeros, counts, alive))
        for index, activation in enumerate(network.activations)
    ]
    nats = []
    for number, row in enumerate(torch.from_numpy(rows)):
        hidden = network.hidden(row[None, :-1].to(device))[0]
        logits = network.head(hidden).float()
        nats.append(float(functional.cross_entropy(logits, row[1:].to(device), reduction="sum")))
        progress(number + 1, len(rows))
    for hook in hooks:
        hook.remove()
    dead = [float((~one).float().mean()) for one in alive if one is not None]
    return Measured(nats, rows.shape[1] - 1, (zeros / counts).tolist(), dead)


def _watch(
    index: int, zeros: Tensor, counts: Tensor, alive: list[Tensor | None]
) -> Callable[[object, object, Tensor], None]:
    def see(_: object, __: object, found: Tensor) -> None:
        active = found.flatten(0, -2) != 0
        zeros[index] += int((~active).sum())
        counts[index] += active.numel()
        some, before = active.any(dim=0).cpu(), alive[index]
        alive[index] = some if before is None else before | some

    return see
