"""The run: steps of distillation while the wanted share of zeros rises; it goes on where it was stopped."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from storage.builtin.train import SparsitySteering
from storage.errors import UsageError
from storage.files import replacing
from workers.lab.relufy import lora
from workers.lab.relufy.distil import Terms, Weights, backward
from workers.lab.relufy.network import Network

STATE, LOG, RECIPE = "last.pt", "log.jsonl", "recipe.json"
TOKENS_PER_PASS = 2048  # whose activations exist at once
FASTEST = 0.2  # change of a penalty's log-weight per step and per unit of log-share error
START = 1.0  # a penalty's first weight: the model is trained, and moves little for less
FIRST_SHARE = 0.25  # of activations not zero, that the penalty begins at

Progress = Callable[[int, Terms, list[float]], None]  # steps done, terms, shares not zero of each layer


@dataclass(frozen=True, slots=True)
class Recipe:
    """Everything that decides the trained weights, apart from checkpoint and text."""

    steps: int
    tokens: int  # a step
    length: int  # of a row
    rate: float
    kl: float
    layers: float
    zeros: float  # share of zeros aimed at, in every layer
    control: bool  # the old activation, and no penalty
    lora: int  # rank; 0: all parameters
    seed: int

    @property
    def rows(self) -> int:
        return max(1, self.tokens // self.length)

    def factor(self, step: int) -> float:
        """Of the rate: a twentieth of the steps to rise, the last three tenths to fall."""
        rise, fall = max(1, self.steps // 20), max(1, round(0.3 * self.steps))
        return min((step + 1) / rise, 1.0, (self.steps - step) / fall)

    @property
    def speed(self) -> float:
        """Of the penalty's steering: a short run has to find its weights in few steps."""
        return min(FASTEST, max(SparsitySteering.SPEED, 50 / self.steps))

    def wanted_share(self, step: int) -> float:
        """Of activations not zero: falls geometrically over three fifths of the steps."""
        progress = min(1.0, step / max(1.0, 0.6 * self.steps))
        return float(FIRST_SHARE * ((1 - self.zeros) / FIRST_SHARE) ** progress)


@dataclass(frozen=True, slots=True)
class _State:
    """What a run saves."""

    network: Network
    optimiser: torch.optim.Optimizer
    steering: SparsitySteering

    def save(self, path: Path, done: int) -> None:
        trained = {name for name, one in self.network.model.named_parameters() if one.requires_grad}
        parameters = {n: t for n, t in self.network.model.state_dict().items() if n in trained}
        state = {
            "step": done,
            "model": parameters,
            "optimizer": self.optimiser.state_dict(),
            "steering": self.steering.log_weight,
        }
        with replacing(path) as file:
            torch.save(state, file)

    def resume(self, path: Path) -> int:
        """The number of steps already done."""
        if not path.exists():
            return 0
        state = torch.load(path, weights_only=True)
        self.network.model.load_state_dict(state["model"], strict=False)
        self.optimiser.load_state_dict(state["optimizer"])
        self.steering.log_weight = state["steering"]
        return int(state["step"])


def train(
    checkpoint: Path,
    rows: npt.NDArray[np.int64],
    recipe: Recipe,
    out: Path,
    device: str = "cpu",
    save_every: int = 25,
    progress: Progress = lambda done, terms, shares: None,
) -> Path:
    """Train on `rows` [n, length + 1]; returns the checkpoint's directory. Goes on from `out`'s last state.

    Raises UsageError for a run that was begun with other settings.
    """
    _settle(out, recipe, checkpoint)
    original, student = Network.open(checkpoint, device), Network.open(checkpoint, device)
    if original.is_relu:
        raise UsageError(f"{checkpoint} has ReLU already: train its predictors")
    original.model.requires_grad_(False)
    if not recipe.control:
        student = student.swap()
    torch.manual_seed(recipe.seed)  # of the adapters
    if recipe.lora:
        student.model.requires_grad_(False)
        lora.adapt(student.decoder, recipe.lora)
    parameters = [one for one in student.model.parameters() if one.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=recipe.rate, betas=(0.9, 0.95), weight_decay=0.0)
    state = _State(student, optimiser, SparsitySteering(len(student.ffns), recipe.speed, START))
    for step in range(state.resume(out / STATE), recipe.steps):
        terms, shares = _step(state, original, rows, recipe, step, device)
        with (out / LOG).open("a", encoding="utf-8") as log:
            log.write(json.dumps({"step": step, **asdict(terms), "shares": shares}) + "\n")
        done = step + 1
        if done % save_every == 0 or done == recipe.steps:
            state.save(out / STATE, done)
        progress(done, terms, shares)
    lora.merge(student.decoder)
    student.write(checkpoint, out / "checkpoint")
    return out / "checkpoint"


def _settle(out: Path, recipe: Recipe, checkpoint: Path) -> None:
    """Keep the recipe beside the run, or find that it is the same."""
    out.mkdir(parents=True, exist_ok=True)
    said = {**asdict(recipe), "checkpoint": str(checkpoint.resolve())}
    path = out / RECIPE
    if not path.is_file():
        path.write_text(json.dumps(said, indent=2) + "\n", encoding="utf-8")
        return
    found: Any = json.loads(path.read_text(encoding="utf-8"))
    other = [key for key, value in said.items() if found.get(key) != value]
    if other:
        raise UsageError(f"{out} was begun with another {other[0]}: give that, or another directory")


def _step(
    state: _State,
    original: Network,
    rows: npt.NDArray[np.int64],
    recipe: Recipe,
    step: int,
    device: str,
) -> tuple[Terms, list[float]]:
    batch = torch.from_numpy(_batch(rows, recipe, step)).to(device)
    total = batch[:, 1:].numel()
    activations = state.network.activations
    slopes = state.steering.log_weight.exp()
    for activation, slope, ffn in zip(activations, slopes, state.network.ffns, strict=True):
        activation.reset()
        activation.slope = slope.to(device) / (total * _neurons(ffn))
    weights, terms = Weights(recipe.kl, recipe.layers), Terms(0.0, 0.0, 0.0)
    for part in torch.split(batch, max(1, TOKENS_PER_PASS // (batch.shape[1] - 1))):
        terms += backward(state.network, original, part, weights, total)
    nn.utils.clip_grad_norm_([p for p in state.network.model.parameters() if p.requires_grad], 1.0)
    for group in state.optimiser.param_groups:
        group["lr"] = recipe.rate * recipe.factor(step)
    state.optimiser.step()
    state.optimiser.zero_grad(set_to_none=True)
    shares = [one.active / max(one.all, 1) for one in activations]
    if not recipe.control:
        state.steering.update(torch.tensor(shares), recipe.wanted_share(step))
    return terms, [round(share, 4) for share in shares]


def _neurons(ffn: Any) -> int:
    """Of an FFN: the longest side of its matrices that is not the model's width, or that width."""
    return max(int(max(one.shape)) for one in ffn.parameters() if one.ndim == 2)


def _batch(rows: npt.NDArray[np.int64], recipe: Recipe, step: int) -> npt.NDArray[np.int64]:
    """The rows of one step: each of the text's once, in an order of their own, before any comes again."""
    found = []
    for place in range(step * recipe.rows, (step + 1) * recipe.rows):
        epoch, within = divmod(place, len(rows))
        found.append(np.random.default_rng((recipe.seed, epoch)).permutation(len(rows))[within])
    return rows[found]
