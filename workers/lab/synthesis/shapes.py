"""The shapes that can be synthesised: the published `config.json` of each, without its weights.

Falcon's and Llama 2's have ReLU where the published ones have GELU and SiLU: as relufied ones, which the
paper measured, and ReluLLaMA.
"""

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

    @property
    def mixture(self) -> bool:
        """Whether it has experts."""
        return "num_experts_per_tok" in self.config


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
        "activation": "relu",
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


def _llama(
    name: str,
    width: int,
    neurons: int,
    layers: int,
    heads: tuple[int, int],
    vocabulary: int,
    dtype: str = "bfloat16",
    **flags: Any,
) -> Shape:
    """Llama 2 (arXiv 2307.09288), Llama 3 (2407.21783) and what has their form; heads of queries, of keys."""
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_act": "silu",
        "hidden_size": width,
        "intermediate_size": neurons,
        "num_hidden_layers": layers,
        "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1],
        "vocab_size": vocabulary,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": dtype,
        **flags,
    }
    return Shape(name, config, dtype)


def _llama3(name: str, width: int, neurons: int, layers: int, heads: tuple[int, int], **flags: Any) -> Shape:
    """Llama 3.1 and 3.2."""
    rope = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        **flags.pop("rope_scaling", {}),
    }
    return _llama(
        name,
        width,
        neurons,
        layers,
        heads,
        128256,
        head_dim=width // heads[0],
        max_position_embeddings=131072,
        rope_theta=500000.0,
        rope_scaling=rope,
        bos_token_id=128000,
        eos_token_id=128001,
        **flags,
    )


def _mixture(
    name: str,
    kind: tuple[str, str],
    width: int,
    layers: int,
    heads: tuple[int, int],
    vocabulary: int,
    **flags: Any,
) -> Shape:
    """A mixture of experts; `kind` is the model type and its class, heads are of queries and of keys."""
    config = {
        "model_type": kind[0],
        "architectures": [kind[1]],
        "hidden_act": "silu",
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1],
        "head_dim": 128,
        "vocab_size": vocabulary,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "bfloat16",
        **flags,
    }
    return Shape(name, config, "bfloat16")


_FACTOR_32 = {"tie_word_embeddings": True, "rope_scaling": {"factor": 32.0}}

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
        _llama(
            "llama-2-7b",
            4096,
            11008,
            32,
            (32, 32),
            32000,
            "float16",
            hidden_act="relu",
            max_position_embeddings=4096,
        ),
        _llama3("llama-3.1-8b", 4096, 14336, 32, (32, 8)),
        _llama3("llama-3.2-1b", 2048, 8192, 16, (32, 8), **_FACTOR_32),
        _llama3("llama-3.2-3b", 3072, 8192, 28, (24, 8), **_FACTOR_32),
        _llama(
            "minicpm-s-1b",
            1536,
            3840,
            52,
            (24, 8),
            73440,
            model_type="minicpm",
            architectures=["MiniCPMForCausalLM"],
            hidden_act="fatrelu",
            hidden_act_param=0.03,
            max_position_embeddings=4096,
            tie_word_embeddings=True,
            scale_emb=12,
            scale_depth=1.4,
            dim_model_base=256,
        ),
        _llama(
            "qwen3-1.7b",
            2048,
            6144,
            28,
            (16, 8),
            151936,
            model_type="qwen3",
            architectures=["Qwen3ForCausalLM"],
            head_dim=128,
            max_position_embeddings=40960,
            rope_theta=1000000.0,
            rms_norm_eps=1e-6,
            tie_word_embeddings=True,
            bos_token_id=151643,
            eos_token_id=151645,
        ),
        _mixture(
            "qwen3-30b-a3b",
            ("qwen3_moe", "Qwen3MoeForCausalLM"),
            2048,
            48,
            (32, 4),
            151936,
            num_experts=128,
            num_experts_per_tok=8,
            moe_intermediate_size=768,
            intermediate_size=6144,
            norm_topk_prob=True,
            max_position_embeddings=40960,
            rope_theta=1000000.0,
            rms_norm_eps=1e-6,
            bos_token_id=151643,
            eos_token_id=151645,
        ),
        _mixture(
            "olmoe",
            ("olmoe", "OlmoeForCausalLM"),
            2048,
            16,
            (16, 16),
            50304,
            num_experts=64,
            num_experts_per_tok=8,
            intermediate_size=1024,
            norm_topk_prob=False,
            max_position_embeddings=4096,
            rope_theta=10000.0,
            bos_token_id=None,
            eos_token_id=50279,
        ),
        _mixture(
            "mixtral-8x7b",
            ("mixtral", "MixtralForCausalLM"),
            4096,
            32,
            (32, 8),
            32000,
            num_local_experts=8,
            num_experts_per_tok=2,
            intermediate_size=14336,
            max_position_embeddings=32768,
            rope_theta=1000000.0,
        ),
    )
}


MIXTURES = tuple(name for name, shape in SHAPES.items() if shape.mixture)


def find_shape(name: str) -> Shape:
    """Raises UsageError, with the nearest names, for a shape that is not known."""
    if name in SHAPES:
        return SHAPES[name]
    near = difflib.get_close_matches(name.lower().rpartition("/")[2], SHAPES, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else f"known are {', '.join(SHAPES)}"
    raise UsageError(f"unknown shape {name!r}; {hint}")
