"""SmallThinker by its paper (arXiv 2507.20984) and its published code, which transformers does not have.

Checkpoints with every parameter random, and their logits in float64, layer by layer. Nothing here is the
project's own.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

CONFIG: dict[str, Any] = {
    "model_type": "smallthinker",
    "vocab_size": 320,
    "hidden_size": 64,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 24,
    "max_position_embeddings": 128,
    "rms_norm_eps": 2**-20,  # which float32 holds as it is
    "rope_theta": 1.5e6,
    "rope_layout": [0, 1, 1, 1, 0],
    "sliding_window_layout": [0, 1, 1, 1, 0],
    "sliding_window_size": 12,
    "moe_num_primary_experts": 8,
    "moe_num_active_primary_experts": 3,
    "moe_ffn_hidden_size": 64,
    "moe_primary_router_apply_softmax": False,
    "tie_word_embeddings": False,
    "bos_token_id": 2,
    "eos_token_id": 2,
}
PLAIN = {  # as the smaller of the two published models
    "rope_layout": [1] * 5,
    "sliding_window_layout": [0] * 5,
    "moe_primary_router_apply_softmax": True,
    "tie_word_embeddings": True,
}


def write(
    directory: Path, changes: dict[str, Any] | None = None, dtype: str = "float32", seed: int = 0
) -> Path:
    """A checkpoint's directory without a tokenizer."""
    config = {**CONFIG, **(changes or {})}
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in _shapes(config):
        noise = torch.randn(shape, generator=generator)
        if len(shape) == 1:
            values = 1 + 0.3 * noise
        else:
            values = noise * (0.5 if "embed" in name else 1.2 / math.sqrt(shape[1]))
        tensors[name] = values.to(getattr(torch, dtype))
    directory.mkdir(parents=True)
    save_file(tensors, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return directory


def _shapes(config: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    width, head, size = config["hidden_size"], config["head_dim"], config["moe_ffn_hidden_size"]
    yield "model.embed_tokens.weight", (config["vocab_size"], width)
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        queries, keys = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
        yield f"{at}.input_layernorm.weight", (width,)
        yield f"{at}.post_attention_layernorm.weight", (width,)
        for name, rows in (("q", queries), ("k", keys), ("v", keys)):
            yield f"{at}.self_attn.{name}_proj.weight", (rows, width)
        yield f"{at}.self_attn.o_proj.weight", (width, queries)
        yield f"{at}.block_sparse_moe.primary_router.weight", (config["moe_num_primary_experts"], width)
        for expert in range(config["moe_num_primary_experts"]):
            for name, shape in (("gate", (size, width)), ("up", (size, width)), ("down", (width, size))):
                yield f"{at}.block_sparse_moe.experts.{expert}.{name}.weight", shape
    yield "model.norm.weight", (width,)
    if not config["tie_word_embeddings"]:
        yield "lm_head.weight", (config["vocab_size"], width)


def logits(directory: Path, ids: list[int], heard: Callable[[Tensor], None] = lambda scores: None) -> Tensor:
    """[len(ids), vocabulary] float64; `heard` hears each layer's router logits [len(ids), experts]."""
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    weights = {name: value.double() for name, value in load_file(directory / "model.safetensors").items()}
    x = weights["model.embed_tokens.weight"][ids]
    for layer in range(config["num_hidden_layers"]):
        start = f"model.layers.{layer}."
        part = {name.removeprefix(start): value for name, value in weights.items() if name.startswith(start)}
        scores = x @ part["block_sparse_moe.primary_router.weight"].T  # of the input as it is
        heard(scores)
        x = x + _attention(config, layer, part, _rms(config, x, part["input_layernorm.weight"]))
        x = x + _experts(config, part, scores, _rms(config, x, part["post_attention_layernorm.weight"]))
    x = _rms(config, x, weights["model.norm.weight"])
    head = "model.embed_tokens.weight" if config["tie_word_embeddings"] else "lm_head.weight"
    return x @ weights[head].T


def _rms(config: dict[str, Any], x: Tensor, weight: Tensor) -> Tensor:
    return weight * x / (x.square().mean(-1, keepdim=True) + config["rms_norm_eps"]).sqrt()


def _attention(config: dict[str, Any], layer: int, part: dict[str, Tensor], x: Tensor) -> Tensor:
    heads, kv_heads, width = (
        config[key] for key in ("num_attention_heads", "num_key_value_heads", "head_dim")
    )
    q, k, v = (
        (x @ part[f"self_attn.{name}_proj.weight"].T).view(len(x), -1, width).transpose(0, 1)
        for name in ("q", "k", "v")
    )
    if config["rope_layout"][layer]:
        places = torch.arange(len(x), dtype=torch.double)[:, None]
        turns = config["rope_theta"] ** (-torch.arange(0, width, 2, dtype=torch.double) / width)
        cos, sin = (places * turns).cos(), (places * turns).sin()

        def turned(t: Tensor) -> Tensor:
            low, high = t.chunk(2, -1)
            return torch.cat((low * cos - high * sin, high * cos + low * sin), -1)

        q, k = turned(q), turned(k)
    k, v = (t.repeat_interleave(heads // kv_heads, 0) for t in (k, v))
    apart = torch.arange(len(x))[:, None] - torch.arange(len(x))
    seen = apart >= 0
    if config["sliding_window_layout"][layer]:
        seen &= apart < config["sliding_window_size"]
    scores = (q @ k.transpose(1, 2) / math.sqrt(width)).masked_fill(~seen, -torch.inf)
    mixed = scores.softmax(-1) @ v
    return mixed.transpose(0, 1).flatten(1) @ part["self_attn.o_proj.weight"].T


def _experts(config: dict[str, Any], part: dict[str, Tensor], scores: Tensor, h: Tensor) -> Tensor:
    best, chosen = scores.topk(config["moe_num_active_primary_experts"], dim=-1)
    if config["moe_primary_router_apply_softmax"]:
        weights = best.softmax(-1)
    else:
        weights = best.sigmoid() / best.sigmoid().sum(-1, keepdim=True)
    out = torch.zeros_like(h)
    for row in range(len(h)):
        for expert, weight in zip(chosen[row].tolist(), weights[row], strict=True):
            gate, up, down = (
                part[f"block_sparse_moe.experts.{expert}.{role}.weight"] for role in ("gate", "up", "down")
            )
            out[row] += weight * (down @ ((gate @ h[row]).relu() * (up @ h[row])))
    return out
