"""Train the built-in model from scratch: `python -m storage.builtin.train --corpus DIR --out DIR`.

Recipe: OPT with ReLU, Muon for the blocks' matrices and AdamW for everything else, a constant
learning rate, then a linear cool-down on the simple register. An L1 penalty on each layer's mean
FFN activation is steered per layer towards a target share of non-zero activations, so that no
layer stays dense and none dies. The constant part does not depend on the number of steps: a run
may be shortened or lengthened while it is in it. Runs resume from their last checkpoint.

`--architecture qwen3`, `qwen3_moe` and `falcon` train the siblings (`siblings.py`) by the same recipe
without the penalty; a mixture's routers are kept even by Switch's balance loss (`experts.py`).
"""

from __future__ import annotations

import ctypes
import json
import math
import time
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor, nn

from storage.builtin import corpus
from storage.builtin.muon import StackedMuon
from storage.builtin.network import Decoder, Network, Shape
from storage.builtin.passes import accumulate, active_share, replicas
from storage.builtin.siblings import settings, sibling
from storage.files import replacing

LENGTHS = (256, 512, 256, 1280)  # tokens a row, cycled; every fourth step trains all positions
EVALUATE_EVERY = 100
PRINT_EVERY = 20
COOLDOWN = 0.3  # of the steps, where only their number is given


class Architecture(StrEnum):
    OPT = "opt"
    QWEN3 = "qwen3"
    QWEN3_MOE = "qwen3_moe"
    FALCON = "falcon"


# FFN width in units of d_model. A gated FFN has three matrices instead of two, and grouped heads leave
# parameters to the FFN: each dense architecture has 12 million in all at the default shape. A mixture's
# is the width of all experts together: 15.3 million, of which a token uses 4.3.
FFN_WIDTH = {Architecture.OPT: 8, Architecture.QWEN3: 6, Architecture.QWEN3_MOE: 8, Architecture.FALCON: 9}


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the trained weights, apart from the corpus and the shape."""

    stable_steps: int
    cooldown_steps: int
    warmup_steps: int = 60
    muon_rate: float = 0.02
    adam_rate: float = 3e-3
    weight_decay: float = 0.1
    target_share: float = 0.03  # of FFN activations non-zero, where steered; 0 trains without the penalty
    ramp_steps: int = 600
    tokens: int = 10_240  # a step
    balance: float = 0.01  # weight of each layer's balance loss, where there are experts; Switch's
    seed: int = 0

    @property
    def steps(self) -> int:
        return self.stable_steps + self.cooldown_steps

    def rate(self, step: int) -> float:
        """Learning-rate factor: warm-up, constant, linear to zero."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        return min(1.0, (self.steps - step) / max(1, self.cooldown_steps))

    def mix(self, step: int) -> dict[str, float]:
        return corpus.STABLE_MIX if step < self.stable_steps else corpus.COOLDOWN_MIX

    def wanted_share(self, step: int) -> float:
        """The share aimed at: from one half down to the target, geometrically over the ramp."""
        progress = min(1.0, step / self.ramp_steps)
        return float(0.5 * (self.target_share / 0.5) ** progress)


class SparsitySteering:
    """One L1 weight per layer, moved so that the layer's active share follows the wanted one."""

    SPEED = 0.05  # change of log-weight per step and per unit of log-share error
    START, LEAST, MOST = 1e-2, 1e-4, 20.0

    def __init__(self, layers: int, speed: float = SPEED, start: float = START) -> None:
        self._speed = speed
        self.log_weight = torch.full((layers,), math.log(start))

    def slopes(self, activations_per_layer: int) -> Tensor:
        """Gradient of (weight × mean activation) by one activation, per layer."""
        return self.log_weight.exp() / activations_per_layer

    def update(self, shares: Tensor, wanted: float) -> None:
        error = (shares.clamp_min(1e-4) / wanted).log()
        moved = self.log_weight + self._speed * error.clamp(-2, 2)
        self.log_weight = moved.clamp(math.log(self.LEAST), math.log(self.MOST))


def optimizers(model: nn.Module, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon for the blocks' matrices, experts' and routers' too; AdamW for embeddings, norms and biases."""
    matrices: list[nn.Parameter] = []
    stacks: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.ndim == 3:
            stacks.append(parameter)
        else:
            (matrices if parameter.ndim == 2 and "embed" not in name else others).append(parameter)
    rate, decay, momentum = recipe.muon_rate, recipe.weight_decay, 0.95
    chosen: list[torch.optim.Optimizer] = [
        torch.optim.Muon(matrices, lr=rate, weight_decay=decay, momentum=momentum),
        torch.optim.AdamW(others, lr=recipe.adam_rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    ]
    if stacks:
        chosen.append(StackedMuon(stacks, lr=rate, weight_decay=decay, momentum=momentum))
    return chosen


def activity(shares: list[float]) -> str:
    """For the line of progress; empty where no layer is steered."""
    if not shares:
        return ""
    return f"active {sum(shares) / len(shares):.2%} (least {min(shares):.2%})  "


@torch.no_grad()
def validation_loss(model: Network, rows: Tensor) -> tuple[float, list[float]]:
    """Nats a token over `rows` `[n, length + 1]`, and the active share per layer."""
    total = 0.0
    shares = torch.zeros(model.steered)
    for chunk in rows.split(8):
        with torch.autocast("cpu", torch.bfloat16):
            hidden, activations = model(chunk[:, :-1])
        total += model.loss(hidden, chunk[:, 1:]).item()
        shares += active_share(activations) * len(chunk) / len(rows)
    return total / rows[:, 1:].numel(), shares.tolist()


def keep_heap() -> None:
    """Let glibc reuse freed activations instead of returning them to the system: 15 % faster."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        m_trim_threshold, m_top_pad, m_mmap_threshold = -1, -2, -3
        mallopt(m_mmap_threshold, 32 << 20)
        mallopt(m_trim_threshold, 2**31 - 1)
        mallopt(m_top_pad, 256 << 20)


@dataclass(frozen=True)
class State:
    """What a run saves, and all it needs to go on as if it had not been stopped."""

    model: Network
    optimisers: list[torch.optim.Optimizer]
    steering: SparsitySteering

    def save(self, path: Path, done: int) -> None:
        state = {
            "step": done,
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimisers],
            "steering": self.steering.log_weight,
        }
        with replacing(path) as file:
            torch.save(state, file)

    def resume(self, path: Path) -> int:
        """The number of steps already done."""
        if not path.exists():
            return 0
        state = torch.load(path, weights_only=True)
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimisers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.steering.log_weight = state["steering"]
        print(f"resuming at step {state['step']}", flush=True)
        return int(state["step"])

    def learn(self, factor: float) -> None:
        """One step of every optimiser at `factor` of its rate; the gradients are used up."""
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimisers:
            for group in optimizer.param_groups:
                group["lr"] = optimizer.defaults["lr"] * factor
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)


def train(
    model: Network,
    mixture: corpus.Mixture,
    held_out: Tensor,
    recipe: Recipe,
    out: Path,
    save_every: int = 100,
    workers: int = 1,
) -> None:
    """Train to the end of the recipe, appending to `out/log.jsonl`; resumes from `out/last.pt`.

    `workers` threads share the passes of a step.
    """
    networks = replicas(model, workers)
    state = State(model, optimizers(model, recipe), SparsitySteering(model.steered))
    first = state.resume(out / "last.pt")
    started = time.monotonic()
    for step in range(first, recipe.steps):
        length = LENGTHS[step % len(LENGTHS)]
        rows = torch.from_numpy(
            mixture.batch(step, recipe.seed, recipe.mix(step), recipe.tokens // length, length)
        )
        slopes = state.steering.slopes(recipe.tokens * model.d_ff)
        passed = accumulate(networks, rows, slopes if recipe.target_share else slopes * 0, recipe.balance)
        state.learn(recipe.rate(step))
        if recipe.target_share:
            state.steering.update(passed.shares, recipe.wanted_share(step))
        record: dict[str, object] = {"step": step, "length": length, **passed.record()}
        done = step + 1
        rate = (done - first) * recipe.tokens / (time.monotonic() - started)
        line = f"step {done}/{recipe.steps}  train {passed.loss:.3f}  {passed.use()}"
        if done % EVALUATE_EVERY == 0 or done == recipe.steps:
            held_loss, held_shares = validation_loss(model, held_out)
            record |= {"valid": round(held_loss, 4), "valid_shares": [round(s, 4) for s in held_shares]}
            line += f"valid {held_loss:.4f}  {activity(held_shares)}"
        if done % PRINT_EVERY == 0 or done == recipe.steps:
            print(f"{line}{rate:.0f} tokens/s", flush=True)
        with (out / "log.jsonl").open("a") as log:
            log.write(json.dumps(record) + "\n")
        if done % save_every == 0 or done == recipe.steps:
            state.save(out / "last.pt", done)


def build(architecture: Architecture, shape: Shape) -> Network:
    """The network before training."""
    return Decoder(shape) if architecture is Architecture.OPT else sibling(settings(architecture, shape))


def write_checkpoint(model: Network, tokenizer: Tokenizer, directory: Path) -> None:
    """Write `config.json`, `model.safetensors` (16 bits) and `tokenizer.json`."""
    directory.mkdir(parents=True, exist_ok=True)
    save_file(model.tensors(), directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(model.config, indent=2) + "\n")
    tokenizer.save(str(directory / "tokenizer.json"))


def tokenizer_of(architecture: Architecture, corpus_dir: Path, out: Path) -> Tokenizer:
    """A sibling's is the built-in model's; the built-in model's is trained, once a run."""
    if architecture is not Architecture.OPT:
        return Tokenizer.from_file(str(Path(__file__).parent / "tokenizer.json"))
    path = out / "tokenizer.json"
    if not path.exists():
        corpus.train_tokenizer(corpus_dir).save(str(path))
    return Tokenizer.from_file(str(path))


def held_out_rows(directory: Path, tokenizer: Tokenizer, rows: int, length: int = 512) -> Tensor:
    """The first `rows` × `length` validation tokens as `[rows, length + 1]`."""
    stream = corpus.encode_all(tokenizer, corpus.validation_stories(directory)).astype(np.int64)
    usable = min(rows, (len(stream) - 1) // length)
    return torch.from_numpy(np.stack([stream[i * length : (i + 1) * length + 1] for i in range(usable)]))


def main(
    corpus_dir: Annotated[Path, typer.Option("--corpus", help="Directory of the training text.")],
    out: Annotated[Path, typer.Option(help="Directory for checkpoints, log and result.")],
    architecture: Annotated[
        Architecture, typer.Option(help="opt: the built-in model; the others: its siblings.")
    ] = Architecture.OPT,
    stable_steps: Annotated[int, typer.Option(help="Steps at the constant learning rate.")] = 1300,
    cooldown_steps: Annotated[int, typer.Option(help="Steps of linear cool-down.")] = 700,
    steps: Annotated[
        int | None,
        typer.Option(help="Steps in all, 0.3 of them cool-down, instead of the two options above."),
    ] = None,
    save_every: Annotated[int, typer.Option(help="Steps between two states that a run goes on from.")] = 100,
    workers: Annotated[
        int | None,
        typer.Option(help="Threads that share the passes of a step; without it, torch's share each product."),
    ] = None,
    layers: Annotated[int, typer.Option(help="Number of blocks.")] = 8,
    d_model: Annotated[int, typer.Option(help="Width.")] = 256,
    target_share: Annotated[
        float,
        typer.Option(help="Wanted share of non-zero FFN activations; 0: no penalty. Siblings have none."),
    ] = 0.03,
    muon_rate: Annotated[float, typer.Option(help="Muon's learning rate.")] = 0.02,
    ramp_steps: Annotated[int, typer.Option(help="Steps over which the wanted share falls.")] = 600,
    tokens: Annotated[int, typer.Option(help="Tokens a step, 1,280 or more.", min=max(LENGTHS))] = 10_240,
    balance: Annotated[float, typer.Option(help="Weight of the balance loss of experts.")] = 0.01,
    seed: Annotated[int, typer.Option(help="Seed of initialisation and data order.")] = 0,
) -> None:
    """Train the model and write its Hugging Face checkpoint to OUT/checkpoint."""
    keep_heap()
    if workers is not None:
        torch.set_num_threads(1)
    out.mkdir(parents=True, exist_ok=True)
    if steps is not None:
        cooldown_steps = round(COOLDOWN * steps)
        stable_steps = steps - cooldown_steps
    width = FFN_WIDTH[architecture]
    shape = Shape(layers=layers, d_model=d_model, d_ff=width * d_model, heads=d_model // 64)
    recipe = Recipe(
        stable_steps=stable_steps,
        cooldown_steps=cooldown_steps,
        target_share=target_share if architecture is Architecture.OPT else 0.0,
        muon_rate=muon_rate,
        ramp_steps=ramp_steps,
        tokens=tokens,
        balance=balance,
        seed=seed,
    )
    tokenizer = tokenizer_of(architecture, corpus_dir, out)
    mixture = corpus.Mixture.prepare(corpus_dir, tokenizer, out)
    held_out = held_out_rows(corpus_dir, tokenizer, rows=64)
    settled = {"architecture": architecture, **asdict(recipe), **asdict(shape)}
    (out / "recipe.json").write_text(json.dumps(settled, indent=2) + "\n")
    torch.manual_seed(seed)
    model = build(architecture, shape)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {recipe}", flush=True)
    train(model, mixture, held_out, recipe, out, save_every, workers or 1)
    write_checkpoint(model, tokenizer, out / "checkpoint")


if __name__ == "__main__":
    typer.run(main)
