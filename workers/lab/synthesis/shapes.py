"""The shapes that can be synthesised: the published `config.json` of each, without its weights."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from storage.errors import UsageError


@dataclass(frozen=True, slots=True)
class Shape:
    """A published checkpoint's configuration and the dtype it is published in."""

    name: str
    config: Mapping[str, Any]
    dtype: str  # float16 | bfloat16


def _opt(name: str, width: int, layers: int, heads: int) -> Shape:
    """OPT (arXiv 2205.01068, table 1). d_ff is 4 d_model in every size."""
    config = {
        "model_type": "opt",
        "architectures": ["OPTForCausalLM"],
        "activation_function": "relu",
        "hidden_size": width,
        "word_embed_proj_dim": width,
        "ffn_dim": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "max_position_embeddings": 2048,
        "vocab_size": 50272,
        "do_layer_norm_before": True,
        "dropout": 0.1,
        "attention_dropout": 0.0,
        "layerdrop": 0.0,
        "bos_token_id": 2,
        "eos_token_id": 2,
        "pad_token_id": 1,
        "prefix": "</s>",
        "torch_dtype": "float16",
    }
    return Shape(name, config, "float16")


def _falcon(name: str, width: int, layers: int, heads: int, **flags: Any) -> Shape:
    """Falcon (arXiv 2311.16867)."""
    config = {
        "model_type": "falcon",
        "architectures": ["FalconForCausalLM"],
        "activation": "gelu",
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "vocab_size": 65024,
        "alibi": False,
        "bias": False,
        "multi_query": True,
        "new_decoder_architecture": False,
        "parallel_attn": True,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "layer_norm_epsilon": 1e-5,
        "bos_token_id": 11,
        "eos_token_id": 11,
        "torch_dtype": "bfloat16",
        **flags,
    }
    return Shape(name, config, "bfloat16")


SHAPES = {
    shape.name: shape
    for shape in (
        _opt("opt-125m", 768, 12, 12),
        _opt("opt-1.3b", 2048, 24, 32),
        _opt("opt-2.7b", 2560, 32, 32),
        _opt("opt-6.7b", 4096, 32, 32),
        _opt("opt-13b", 5120, 40, 40),
        _opt("opt-30b", 7168, 48, 56),
        _falcon("falcon-7b", 4544, 32, 71),
        _falcon(
            "falcon-rw-1b",
            2048,
            24,
            32,
            alibi=True,
            bias=True,
            multi_query=False,
            parallel_attn=False,
            vocab_size=50304,
            bos_token_id=1,
            eos_token_id=2,
        ),
        _falcon("falcon-40b", 8192, 60, 128, new_decoder_architecture=True, num_kv_heads=8),
    )
}


def find_shape(name: str) -> Shape:
    """Raises UsageError, with the nearest names, for a shape that is not known."""
    if name in SHAPES:
        return SHAPES[name]
    near = difflib.get_close_matches(name.lower().rpartition("/")[2], SHAPES, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else f"known are {', '.join(SHAPES)}"
    raise UsageError(f"unknown shape {name!r}; {hint}")
