"""The shapes of the presets: what of a published `config.json` decides sizes, without its weights.

So it can be told what a model would need, and what it would do, before any of it is fetched.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final


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


def opt(name: str, width: int, layers: int, heads: int, **flags: Any) -> Shape:
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
        **flags,
    }
    return Shape(name, config, "float16")


def falcon(
    name: str, width: int, layers: int, heads: int, *, activation: str = "gelu", **flags: Any
) -> Shape:
    """Falcon (arXiv 2311.16867)."""
    config = {
        "model_type": "falcon",
        "architectures": ["FalconForCausalLM"],
        "activation": activation,
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


def llama(
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


def llama3(name: str, width: int, neurons: int, layers: int, heads: tuple[int, int], **flags: Any) -> Shape:
    """Llama 3.1 and 3.2."""
    rope = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        **flags.pop("rope_scaling", {}),
    }
    return llama(
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


def mixture(
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


FACTOR_32: Final = {"tie_word_embeddings": True, "rope_scaling": {"factor": 32.0}}  # Llama 3.2's


def _of_kind(kind: str, *shape: Any, **flags: Any) -> Shape:
    """A model of Llama's form in this family."""
    return llama(*shape, model_type=kind, **flags)


def _qwen2(
    name: str, width: int, neurons: int, layers: int, heads: tuple[int, int], vocabulary: int = 151936
) -> Shape:
    """Qwen 2.5 (arXiv 2412.15115); all but the largest here have the embedding as their head."""
    return _of_kind(
        "qwen2", name, width, neurons, layers, heads, vocabulary,
        tie_word_embeddings=vocabulary == 151936, max_position_embeddings=32768,
    )  # fmt: skip


def qwen3(name: str, width: int, neurons: int, layers: int, heads: tuple[int, int], **flags: Any) -> Shape:
    """Qwen 3 (arXiv 2505.09388)."""
    return llama(
        name,
        width,
        neurons,
        layers,
        heads,
        151936,
        **{
            "model_type": "qwen3",
            "architectures": ["Qwen3ForCausalLM"],
            "head_dim": 128,
            "max_position_embeddings": 40960,
            "rope_theta": 1000000.0,
            "rms_norm_eps": 1e-6,
            "tie_word_embeddings": True,
            "bos_token_id": 151643,
            "eos_token_id": 151645,
            **flags,
        },
    )


def _gemma3(
    name: str, width: int, neurons: int, layers: int, heads: tuple[int, int], vocabulary: int, window: int
) -> Shape:
    """Gemma 3 (arXiv 2503.19786)."""
    return _of_kind(
        "gemma3_text", name, width, neurons, layers, heads, vocabulary,
        hidden_activation="gelu_pytorch_tanh", head_dim=256, sliding_window=window,
        max_position_embeddings=32768, tie_word_embeddings=True,
    )  # fmt: skip


_TIED: Final = {"tie_word_embeddings": True}
_8K: Final = {"max_position_embeddings": 8192}
_32K: Final = {"max_position_embeddings": 32768}

PUBLISHED: Final = {
    shape.name: shape
    for shape in (
        opt("opt-125m", 768, 12, 12),
        opt("opt-350m", 1024, 24, 16, word_embed_proj_dim=512, do_layer_norm_before=False),
        opt("opt-1.3b", 2048, 24, 32),
        opt("opt-2.7b", 2560, 32, 32),
        opt("opt-6.7b", 4096, 32, 32),
        opt("opt-13b", 5120, 40, 40),
        opt("opt-30b", 7168, 48, 56),
        falcon(
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
        falcon("falcon-7b", 4544, 32, 71),
        falcon("falcon-7b-instruct", 4544, 32, 71),
        falcon("falcon-40b", 8192, 60, 128, new_decoder_architecture=True, num_kv_heads=8),
        llama3("llama-3.2-1b-instruct", 2048, 8192, 16, (32, 8), **FACTOR_32),
        llama3("llama-3.2-3b-instruct", 3072, 8192, 28, (24, 8), **FACTOR_32),
        llama3("llama-3.1-8b-instruct", 4096, 14336, 32, (32, 8)),
        _of_kind("mistral", "mistral-7b-instruct", 4096, 14336, 32, (32, 8), 32768, **_32K),
        _qwen2("qwen2.5-0.5b-instruct", 896, 4864, 24, (14, 2)),
        _qwen2("qwen2.5-1.5b-instruct", 1536, 8960, 28, (12, 2)),
        _qwen2("qwen2.5-3b-instruct", 2048, 11008, 36, (16, 2)),
        _qwen2("qwen2.5-7b-instruct", 3584, 18944, 28, (28, 4), 152064),
        qwen3("qwen3-0.6b", 1024, 3072, 28, (16, 8)),
        qwen3("qwen3-1.7b", 2048, 6144, 28, (16, 8)),
        qwen3("qwen3-4b", 2560, 9728, 36, (32, 8)),
        qwen3("qwen3-8b", 4096, 12288, 36, (32, 8), tie_word_embeddings=False),
        qwen3("qwen3-14b", 5120, 17408, 40, (40, 8), tie_word_embeddings=False),
        _gemma3("gemma-3-270m-it", 640, 2048, 18, (4, 1), 262144, 512),
        _gemma3("gemma-3-1b-it", 1152, 6912, 26, (4, 1), 262144, 512),
        _gemma3("gemma-3-4b-it", 2560, 10240, 34, (8, 4), 262208, 1024),
        _of_kind("llama", "smollm2-135m-instruct", 576, 1536, 30, (9, 3), 49152, **_TIED, **_8K),
        _of_kind("llama", "smollm2-360m-instruct", 960, 2560, 32, (15, 5), 49152, **_TIED, **_8K),
        _of_kind("llama", "smollm2-1.7b-instruct", 2048, 8192, 24, (32, 32), 49152, **_TIED, **_8K),
        _of_kind("smollm3", "smollm3-3b", 2048, 11008, 36, (16, 4), 128256, **_TIED, **_32K),
        _of_kind("phi3", "phi-4-mini", 3072, 8192, 32, (24, 8), 200064, **_TIED, **_32K),
        _of_kind("olmo2", "olmo-2-7b", 4096, 11008, 32, (32, 32), 100352, max_position_embeddings=4096),
        _of_kind("granite", "granite-3.3-2b", 2048, 8192, 40, (32, 8), 49159, **_TIED, **_32K),
        _of_kind("granite", "granite-3.3-8b", 4096, 12800, 40, (32, 8), 49159, **_TIED, **_32K),
    )
}
