"""The shapes that can be synthesised: the published `config.json` of each, without its weights.

Falcon's and Llama 2's have ReLU where the published ones have GELU and SiLU: as relufied ones, which the
paper measured, and ReluLLaMA.
"""

from __future__ import annotations

import difflib
from dataclasses import replace

from pipeline.models.published import PUBLISHED, Shape, llama, mixture
from storage.errors import UsageError


def _published(preset: str, name: str = "") -> Shape:
    return replace(PUBLISHED[preset], name=name or preset)


def _relufied(preset: str) -> Shape:
    shape = PUBLISHED[preset]
    return replace(shape, config={**shape.config, "activation": "relu"})


SHAPES = {
    shape.name: shape
    for shape in (
        *(_published(f"opt-{size}") for size in ("125m", "1.3b", "2.7b", "6.7b", "13b", "30b")),
        *(_relufied(f"falcon-{size}") for size in ("7b", "rw-1b", "40b")),
        llama(
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
        *(_published(f"{name}-instruct", name) for name in ("llama-3.1-8b", "llama-3.2-1b", "llama-3.2-3b")),
        llama(
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
        _published("qwen3-1.7b"),
        mixture(
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
        mixture(
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
        mixture(
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
        mixture(
            "gpt-oss-20b",
            ("gpt_oss", "GptOssForCausalLM"),
            2880,
            24,
            (64, 8),
            201088,
            num_local_experts=32,
            num_experts_per_tok=4,
            head_dim=64,
            intermediate_size=2880,
            sliding_window=128,
            swiglu_limit=7.0,
            attention_bias=True,
            max_position_embeddings=131072,
            rope_theta=150000.0,
            rope_scaling={
                "rope_type": "yarn",
                "factor": 32.0,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "truncate": False,
                "original_max_position_embeddings": 4096,
            },
            bos_token_id=199998,
            eos_token_id=200002,
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
