"""Train the built-in model from scratch: `python -m storage.builtin.train --corpus DIR --out DIR`.

Recipe: OPT with ReLU, Muon for the blocks' matrices and AdamW for everything else, a constant
learning rate, then a linear cool-down on the simple register. An L1 penalty on each layer's mean
FFN activation is steered per layer towards a target share of non-zero activations, so that no
layer stays dense and none dies. The constant part does not depend on the number of steps: a run
may be shortened or lengthened while it is in it. Runs resume from their last checkpoint.

`--architecture qwen3` and `falcon` train the siblings (`siblings.py`) by the same recipe without the penalty.
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
from storage.builtin.network import Decoder, Network, Shape
from storage.builtin.siblings import Sibling, settings
from storage.files import replacing

TOKENS_PER_STEP = 10_240
TOKENS_PER_PASS = 5_120  # gradients accumulate over passes: smaller activations stay in the cache
LENGTHS = (256, 512, 256, 1280)  # tokens a row, cycled; every fourth step trains all positions
EVALUATE_EVERY = 100
SAVE_EVERY = 100


class Architecture(StrEnum):
    OPT = "opt"
    QWEN3 = "qwen3"
    FALCON = "falcon"


# FFN width in units of d_model. A gated FFN has three matrices instead of two, and grouped heads leave
# parameters to the FFN: each architecture has 12 million in all at the default shape.
FFN_WIDTH = {Architecture.OPT: 8, Architecture.QWEN3: 6, Architecture.FALCON: 9}


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

    def __init__(self, layers: int) -> None:
        self.log_weight = torch.full((layers,), math.log(self.START))

    def slopes(self, activations_per_layer: int) -> Tensor:
        """Gradient of (weight × mean activation) by one activation, per layer."""
        return self.log_weight.exp() / activations_per_layer

    def update(self, shares: Tensor, wanted: float) -> None:
        error = (shares.clamp_min(1e-4) / wanted).log()
        moved = self.log_weight + self.SPEED * error.clamp(-2, 2)
        self.log_weight = moved.clamp(math.log(self.LEAST), math.log(self.MOST))


def optimizers(model: nn.Module, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon for the blocks' matrices; AdamW for embeddings, norms and biases."""
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        (matrices if parameter.ndim == 2 and "embed" not in name else others).append(parameter)
    return [
        torch.optim.Muon(
            matrices,
            lr=recipe.muon_rate,
            weight_decay=recipe.weight_decay,
            momentum=0.95,
        ),
        torch.optim.AdamW(others, lr=recipe.adam_rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    ]


def active_share(activations: list[Tensor]) -> Tensor:
    """Share of non-zero activations per layer, `[layers]` float32."""
    return torch.tensor([torch.count_nonzero(a).item() / a.numel() for a in activations])


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


def accumulate(model: Network, rows: Tensor, slopes: Tensor) -> tuple[float, Tensor]:
    """Forward and backward over `rows` in passes; returns the mean loss and the active shares."""
    tokens = rows[:, 1:].numel()
    passes = rows.split(max(1, TOKENS_PER_PASS // (rows.shape[1] - 1)))
    total, shares = 0.0, torch.zeros(model.steered)
    for part in passes:
        with torch.autocast("cpu", torch.bfloat16):
            hidden, activations = model(part[:, :-1], slopes)
        loss = model.loss(hidden, part[:, 1:]) / tokens
        loss.backward()
        total += loss.item()
        shares += active_share(activations) * len(part) / len(rows)
    return total, shares


def keep_heap() -> None:
    """Let glibc reuse freed activations instead of returning them to the system: 15 % faster."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        m_trim_threshold, m_top_pad, m_mmap_threshold = -1, -2, -3
        mallopt(m_mmap_threshold, 32 << 20)
        mallopt(m_trim_threshold, 2**31 - 1)
        mallopt(m_top_pad, 256 << 20)


def train(model: Network, mixture: corpus.Mixture, held_out: Tensor, recipe: Recipe, out: Path) -> None:
    """Train to the end of the recipe, appending to `out/log.jsonl`; resumes from `out/last.pt`."""
    optimisers = optimizers(model, recipe)
    steering = SparsitySteering(model.steered)
    first = 0
    last = out / "last.pt"
    if last.exists():
        state = torch.load(last, weights_only=True)
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimisers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        steering.log_weight = state["steering"]
        first = state["step"]
        print(f"resuming at step {first}", flush=True)
    base_rates = (recipe.muon_rate, recipe.adam_rate)
    started = time.monotonic()
    for step in range(first, recipe.steps):
        length = LENGTHS[step % len(LENGTHS)]
        rows = torch.from_numpy(
            mixture.batch(step, recipe.seed, recipe.mix(step), TOKENS_PER_STEP // length, length)
        )
        for optimizer, base in zip(optimisers, base_rates, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = base * recipe.rate(step)
        weights = steering.slopes(TOKENS_PER_STEP * model.d_ff)
        loss, shares = accumulate(model, rows, weights if recipe.target_share else weights * 0)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimisers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if recipe.target_share:
            steering.update(shares, recipe.wanted_share(step))
        record: dict[str, object] = {
            "step": step,
            "loss": round(loss, 4),
            "shares": [round(share, 4) for share in shares.tolist()],
            "length": length,
        }
        done = step + 1
        if done % EVALUATE_EVERY == 0 or done == recipe.steps:
            held_loss, held_shares = validation_loss(model, held_out)
            record |= {"valid": round(held_loss, 4), "valid_shares": [round(s, 4) for s in held_shares]}
            rate = (done - first) * TOKENS_PER_STEP / (time.monotonic() - started)
            print(
                f"step {done}/{recipe.steps}  train {loss:.3f}  valid {held_loss:.4f}  "
                f"{activity(held_shares)}{rate:.0f} tokens/s",
                flush=True,
            )
        with (out / "log.jsonl").open("a") as log:
            log.write(json.dumps(record) + "\n")
        if done % SAVE_EVERY == 0 or done == recipe.steps:
            state = {
                "step": done,
                "model": model.state_dict(),
                "optimizers": [optimizer.state_dict() for optimizer in optimisers],
                "steering": steering.log_weight,
            }
            with replacing(last) as file:
                torch.save(state, file)


def build(architecture: Architecture, shape: Shape) -> Network:
    """The network before training."""
    return Decoder(shape) if architecture is Architecture.OPT else Sibling(settings(architecture, shape))


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
        Architecture, typer.Option(help="opt: the built-in model; qwen3, falcon: its siblings.")
    ] = Architecture.OPT,
    stable_steps: Annotated[int, typer.Option(help="Steps at the constant learning rate.")] = 1300,
    cooldown_steps: Annotated[int, typer.Option(help="Steps of linear cool-down.")] = 700,
    layers: Annotated[int, typer.Option(help="Number of blocks.")] = 8,
    d_model: Annotated[int, typer.Option(help="Width.")] = 256,
    target_share: Annotated[
        float,
        typer.Option(help="Wanted share of non-zero FFN activations; 0: no penalty. Siblings have none."),
    ] = 0.03,
    muon_rate: Annotated[float, typer.Option(help="Muon's learning rate.")] = 0.02,
    ramp_steps: Annotated[int, typer.Option(help="Steps over which the wanted share falls.")] = 600,
    seed: Annotated[int, typer.Option(help="Seed of initialisation and data order.")] = 0,
) -> None:
    """Train the model and write its Hugging Face checkpoint to OUT/checkpoint."""
    keep_heap()
    out.mkdir(parents=True, exist_ok=True)
    width = FFN_WIDTH[architecture]
    shape = Shape(layers=layers, d_model=d_model, d_ff=width * d_model, heads=d_model // 64)
    recipe = Recipe(
        stable_steps=stable_steps,
        cooldown_steps=cooldown_steps,
        target_share=target_share if architecture is Architecture.OPT else 0.0,
        muon_rate=muon_rate,
        ramp_steps=ramp_steps,
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
    train(model, mixture, held_out, recipe, out)
    write_checkpoint(model, tokenizer, out / "checkpoint")


if __name__ == "__main__":
    typer.run(main)
