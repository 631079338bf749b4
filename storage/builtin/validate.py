"""Validation loss of the shipped checkpoint: `python -m storage.builtin.validate --corpus DIR`.

`--checkpoint RUN/checkpoint` scores another one that `train.py` wrote.

The held-out stories are scored in rows of 512 tokens, each row on its own, so that most tokens see
between nothing and 511 tokens before them. The marks between stories are seen but not scored:
nats a byte are over the stories' own UTF-8 bytes.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch.nn import functional

from storage.builtin import corpus
from storage.builtin.network import Decoder, Network, Shape
from storage.builtin.siblings import sibling

ROW = 512  # tokens
ROWS_AT_ONCE = 8


def load(checkpoint: Path) -> Network:
    """A checkpoint of `train.py` as a training network, weights widened to float32."""
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    model = _opt(config) if config["model_type"] == "opt" else sibling(config)
    model.load(load_file(checkpoint / "model.safetensors"))
    return model.eval()


def _opt(config: dict[str, Any]) -> Decoder:
    return Decoder(
        Shape(
            d_model=config["hidden_size"],
            d_ff=config["ffn_dim"],
            layers=config["num_hidden_layers"],
            heads=config["num_attention_heads"],
            vocabulary=config["vocab_size"],
            positions=config["max_position_embeddings"],
        )
    )


@torch.no_grad()
def main(
    corpus_dir: Annotated[Path, typer.Option("--corpus", help="Directory with the held-out stories.")],
    checkpoint: Annotated[Path, typer.Option(help="Checkpoint directory.")] = Path(__file__).parent,
    text_out: Annotated[
        Path | None, typer.Option(help="Also write the stories as plain text, as training saw such.")
    ] = None,
) -> None:
    """Print nats a token and nats a byte on the held-out stories, in float32."""
    model = load(checkpoint)
    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    stories = corpus.validation_stories(corpus_dir)
    if text_out is not None:
        text_out.write_text("\n".join(stories), encoding="utf-8")
    stream = corpus.encode_all(tokenizer, stories).astype(np.int64)
    rows = [torch.from_numpy(stream[start : start + ROW + 1]) for start in range(0, len(stream) - 1, ROW)]
    nats, tokens = 0.0, 0
    for start in range(0, len(rows), ROWS_AT_ONCE):
        some = torch.nn.utils.rnn.pad_sequence(
            rows[start : start + ROWS_AT_ONCE], batch_first=True, padding_value=corpus.BOS
        )
        hidden, _ = model(some[:, :-1])
        logits = functional.linear(hidden, model.head).flatten(0, 1)
        targets = some[:, 1:].flatten()
        scored = targets != corpus.BOS
        nats += functional.cross_entropy(logits[scored], targets[scored], reduction="sum").item()
        tokens += int(scored.sum())
    size = sum(len(story.encode()) for story in stories)
    print(
        f"{len(stories):,} stories, {tokens:,} tokens, {size:,} bytes: {nats / tokens:.4f} nats a token "
        f"(perplexity {math.exp(nats / tokens):.2f}), {nats / size:.4f} nats a byte"
    )


if __name__ == "__main__":
    typer.run(main)
