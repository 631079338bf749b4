"""How a trained mixture routes held-out text: `python -m storage.builtin.locality`.

Four questions, each asked of every layer, in rows of 512 tokens that count as one prompt each:
- reuse: of a token's experts, the share that the token before it used, or the one eight before;
- chance: what reuse would be if tokens drew their experts by popularity, each without regard to the others;
- popularity: the share of the traffic that the most used 8 and 16 experts carry, a prompt's own or all
  prompts', and how many experts a prompt touches;
- recall: of a layer's experts, the share that its own router names when it is given the FFN input of the
  layer one, two or three before it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from tokenizers import Tokenizer
from torch import Tensor

from storage.builtin.network import Network
from storage.builtin.siblings import MixtureOfExperts
from storage.builtin.train import held_out_rows
from storage.builtin.validate import load

LAGS = (1, 8)
HOT = (8, 16)
AHEAD = (1, 2, 3)


@dataclass(frozen=True)
class Prompt:
    """Which experts one row of text used; `[layers, tokens, experts]` bool, top_k set a token."""

    used: Tensor
    guessed: dict[int, Tensor]  # by layers ahead; layers that nothing foretells are empty

    @property
    def counts(self) -> Tensor:
        """Tokens of each expert, `[layers, experts]`."""
        return self.used.sum(1)


@dataclass(frozen=True)
class Locality:
    """One layer's figures: shares from 0 to 1, means over prompts but for `overall`, which counts all."""

    reuse: dict[int, float]  # by lag
    chance: float
    hot: dict[int, float]  # by number of experts, each prompt's own most used
    overall: dict[int, float]  # by number of experts, the most used of all prompts
    touched: float  # experts of a prompt
    recall: dict[int, float]  # by layers ahead; without those that would begin below layer 0


def members(chosen: Tensor, experts: int) -> Tensor:
    """`[..., k]` numbers of experts to `[..., experts]` bool."""
    shape = (*chosen.shape[:-1], experts)
    return torch.zeros(shape, dtype=torch.bool).scatter_(-1, chosen, True)


def agreement(truth: Tensor, said: Tensor) -> float:
    """Of the experts in `truth`, the share that is in `said`; both `[tokens, experts]` bool."""
    return ((truth & said).sum() / truth.sum()).item()


def hottest(counts: Tensor, number: int) -> float:
    """Share of the traffic `[experts]` that the `number` most used experts carry."""
    return (counts.topk(number).values.sum() / counts.sum()).item()


def chance(counts: Tensor, tokens: int) -> float:
    """Reuse between tokens that draw their experts independently, as often as `counts` `[experts]` says."""
    often = counts / tokens
    return (often.square().sum() / often.sum()).item()


def locality(prompts: Sequence[Prompt], layer: int) -> Locality:
    """Of one layer."""

    def mean(values: Iterator[float]) -> float:
        return sum(values) / len(prompts)

    of = [prompt.used[layer] for prompt in prompts]
    counts = [prompt.counts[layer] for prompt in prompts]
    everything = torch.stack(counts).sum(0)
    return Locality(
        reuse={lag: mean(agreement(used[lag:], used[:-lag]) for used in of) for lag in LAGS},
        chance=chance(everything, sum(len(used) for used in of)),
        hot={number: mean(hottest(one, number) for one in counts) for number in HOT},
        overall={number: hottest(everything, number) for number in HOT},
        touched=mean((one > 0).sum().item() for one in counts),
        recall={
            ahead: mean(
                agreement(used, prompt.guessed[ahead][layer])
                for used, prompt in zip(of, prompts, strict=True)
            )
            for ahead in AHEAD
            if layer >= ahead
        },
    )


@torch.no_grad()
def route(network: MixtureOfExperts, ids: Tensor) -> Prompt:
    """Which experts `ids` `[tokens]` use, and what the routers name when given earlier layers' inputs."""
    blocks = [layer.mlp for layer in network.decoder.layers]
    inputs: list[Tensor] = []
    hooks = [block.register_forward_pre_hook(lambda _, given: inputs.append(given[0][0])) for block in blocks]
    try:
        network(ids[None])
    finally:
        for hook in hooks:
            hook.remove()
    experts = blocks[0].gate.out_features
    used = torch.stack([members(routing.chosen, experts) for routing in network.routings()])
    guessed = {}
    for ahead in AHEAD:
        guessed[ahead] = torch.zeros_like(used)
        for layer in range(ahead, len(blocks)):
            logits = blocks[layer].gate(inputs[layer - ahead])
            guessed[ahead][layer] = members(logits.topk(blocks[layer].top_k).indices, experts)
    return Prompt(used, guessed)


def _row(of: Locality) -> list[float | None]:
    recall = [of.recall.get(ahead) for ahead in AHEAD]
    return [*of.reuse.values(), of.chance, *of.hot.values(), *of.overall.values(), of.touched / 100, *recall]


def table(layers: Sequence[Locality]) -> Iterator[str]:
    """Markdown, per cent, a line a layer and the mean of those that have the figure."""
    lags = [f"reuse, lag {lag}" for lag in LAGS]
    hot = [f"top {number}, {whose}" for whose in ("prompt", "overall") for number in HOT]
    recall = [f"recall, {ahead} ahead" for ahead in AHEAD]
    heads = ["layer", *lags, "chance", *hot, "experts a prompt", *recall]
    rows = [_row(of) for of in layers]
    known = [[value for value in column if value is not None] for column in zip(*rows, strict=True)]
    means = [sum(column) / len(column) if column else None for column in known]
    yield f"| {' | '.join(heads)} |"
    yield "|---" * len(heads) + "|"
    for name, row in [*enumerate(rows), ("mean", means)]:
        cells = ["–" if value is None else f"{value * 100:.1f}" for value in row]
        yield f"| {name} | {' | '.join(cells)} |"


def mixture(network: Network) -> MixtureOfExperts:
    """The network, if it routes anything."""
    if not isinstance(network, MixtureOfExperts):
        raise typer.BadParameter("the checkpoint is no mixture of experts", param_hint="--checkpoint")
    return network


def main(
    corpus_dir: Annotated[Path, typer.Option("--corpus", help="Directory with the held-out stories.")],
    checkpoint: Annotated[Path, typer.Option(help="Checkpoint directory of a mixture that train.py wrote.")],
    rows: Annotated[int, typer.Option(help="Rows of 512 tokens.")] = 64,
) -> None:
    """Print reuse, popularity and recall of routing on held-out text, layer by layer."""
    network = mixture(load(checkpoint))
    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    held_out = held_out_rows(corpus_dir, tokenizer, rows)[:, :-1]
    prompts = [route(network, ids) for ids in held_out]
    print(f"{len(prompts)} prompts of {held_out.shape[1]} tokens; per cent, but for experts a prompt\n")
    for line in table([locality(prompts, layer) for layer in range(len(prompts[0].used))]):
        print(line)


if __name__ == "__main__":
    typer.run(main)
