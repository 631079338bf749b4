"""Tiny Hugging Face checkpoints with every parameter random and non-trivial, for comparisons.

`write_checkpoint(directory, variant, dtype, ...)` writes what transformers' `save_pretrained`
writes, plus a small byte-level `tokenizer.json`. Norm weights lie around 1 ± 0.3, biases around
± 0.3, and matrices are scaled so that the logits have a standard deviation of at least 1.
"""

from __future__ import annotations

import json
import math
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

VOCABULARY = 320  # ids: 4 special, 256 bytes, the rest never produced by the tokenizer
BOS = EOS = 2  # </s>
POSITIONS = 128

_OPT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "word_embed_proj_dim": 64,
    "num_hidden_layers": 3,
    "ffn_dim": 192,
    "num_attention_heads": 4,
    "max_position_embeddings": POSITIONS,
    "dropout": 0.0,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "pad_token_id": None,
}
_FALCON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 5,
    "max_position_embeddings": POSITIONS,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "activation": "gelu",
}

# name -> (model_type, settings of its transformers configuration)
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "opt": ("opt", {**_OPT}),
    "opt-gelu": ("opt", {**_OPT, "activation_function": "gelu"}),
    "opt-no-bias": ("opt", {**_OPT, "enable_bias": False}),
    "opt-no-affine": ("opt", {**_OPT, "layer_norm_elementwise_affine": False}),
    "opt-untied": ("opt", {**_OPT, "tie_word_embeddings": False}),
    "opt-post-norm": ("opt", {**_OPT, "do_layer_norm_before": False, "word_embed_proj_dim": 32}),
    "opt-projected": ("opt", {**_OPT, "word_embed_proj_dim": 32, "tie_word_embeddings": False}),
    "falcon-7b": ("falcon", {**_FALCON}),
    "falcon-rw": (
        "falcon",
        {
            **_FALCON,
            "alibi": True,
            "bias": True,
            "parallel_attn": False,
            "multi_query": False,
        },
    ),
    "falcon-40b": (
        "falcon",
        {
            **_FALCON,
            "new_decoder_architecture": True,
            "hidden_size": 96,
            "num_attention_heads": 6,
            "num_kv_heads": 2,
            "ffn_hidden_size": 256,
        },
    ),
    "falcon-11b": (
        "falcon",
        {
            **_FALCON,
            "new_decoder_architecture": True,
            "num_ln_in_parallel_attn": 1,
            "hidden_size": 96,
            "num_attention_heads": 6,
            "num_kv_heads": 2,
            "tie_word_embeddings": False,
            "rope_parameters": {"rope_type": "default", "rope_theta": 500042.0},
        },
    ),
    "falcon-relu": ("falcon", {**_FALCON, "activation": "relu", "tie_word_embeddings": False}),
    "falcon-sequential": ("falcon", {**_FALCON, "parallel_attn": False, "bias": True}),
    "falcon-alibi-7b": ("falcon", {**_FALCON, "alibi": True}),
}
_LLAMA = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": POSITIONS,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "pad_token_id": None,
    "tie_word_embeddings": False,
}
# Positions beyond these and windows of this are what prompts of 40 tokens reach.
_ORIGINAL, _WINDOW = 16, 12
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": _ORIGINAL,
}
_YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "original_max_position_embeddings": _ORIGINAL,
}
_GEMMA = {
    **_LLAMA,
    "head_dim": 24,
    "query_pre_attn_scalar": 20,
    "sliding_window": _WINDOW,
    "tie_word_embeddings": True,
}


def _longrope(original: int, positions: int = POSITIONS) -> dict[str, Any]:
    """Of heads of 16, three quarters of which are rotated."""
    return {
        "max_position_embeddings": positions,
        "original_max_position_embeddings": original,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.75,
            "short_factor": [1.0, 1.1, 1.2, 1.4, 1.7, 2.0],
            "long_factor": [1.0, 1.5, 2.5, 4.0, 6.0, 9.0],
        },
    }


GATED: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {**_LLAMA}),
    "llama-biased": ("llama", {**_LLAMA, "attention_bias": True, "mlp_bias": True, "head_dim": 24}),
    "llama-tied-llama3": (
        "llama",
        {**_LLAMA, "tie_word_embeddings": True, "rope_parameters": _LLAMA3_ROPE},
    ),
    "llama-linear": (
        "llama",
        {**_LLAMA, "rope_parameters": {"rope_type": "linear", "rope_theta": 5e5, "factor": 4.0}},
    ),
    "llama-relu": ("llama", {**_LLAMA, "hidden_act": "relu"}),
    "llama-gelu": ("llama", {**_LLAMA, "hidden_act": "gelu", "num_key_value_heads": 4}),
    "mistral": ("mistral", {**_LLAMA, "head_dim": 24, "sliding_window": None}),
    "mistral-window": ("mistral", {**_LLAMA, "sliding_window": _WINDOW}),
    "qwen2": ("qwen2", {**_LLAMA, "rope_parameters": _YARN_ROPE}),
    "qwen2-window": (
        "qwen2",
        {
            **_LLAMA,
            "tie_word_embeddings": True,
            "use_sliding_window": True,
            "sliding_window": _WINDOW,
            "max_window_layers": 1,
        },
    ),
    "qwen3": ("qwen3", {**_LLAMA, "head_dim": 24, "attention_bias": True}),
    "qwen3-yarn": (
        "qwen3",
        {
            **_LLAMA,
            "head_dim": 32,
            "rope_parameters": {**_YARN_ROPE, "truncate": False, "mscale": 1.2, "mscale_all_dim": 0.8},
        },
    ),
    "gemma2": ("gemma2", {**_GEMMA, "attn_logit_softcapping": 4.0, "final_logit_softcapping": 8.0}),
    "gemma3": (
        "gemma3_text",
        {
            **_GEMMA,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            },
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "phi3": ("phi3", {**_LLAMA, "sliding_window": _WINDOW}),
    "phi3-longrope": ("phi3", {**_LLAMA, **_longrope(_ORIGINAL)}),
    "phi3-longrope-short": ("phi3", {**_LLAMA, **_longrope(POSITIONS, 4 * POSITIONS)}),
    "smollm3": ("smollm3", {**_LLAMA, "no_rope_layer_interval": 2}),
    "smollm3-window": (
        "smollm3",
        {
            **_LLAMA,
            "tie_word_embeddings": True,
            "no_rope_layers": [1, 0, 0],
            "use_sliding_window": True,
            "sliding_window": _WINDOW,
            "attention_bias": True,
            "mlp_bias": True,
        },
    ),
    "olmo2": ("olmo2", {**_LLAMA}),
    "granite": (
        "granite",
        {
            **_LLAMA,
            "embedding_multiplier": 12.0,
            "attention_multiplier": 0.3,
            "residual_multiplier": 0.7,
            "logits_scaling": 0.8,
        },
    ),
}
_EXPERTS = {**_LLAMA, "intermediate_size": 64, "num_experts_per_tok": 3}
_QWEN3_MOE = {
    **_EXPERTS,
    "intermediate_size": 96,
    "head_dim": 24,
    "num_experts": 8,
    "moe_intermediate_size": 64,
}
_QWEN2_MOE = {
    **_EXPERTS,
    "intermediate_size": 96,
    "num_experts": 8,
    "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 80,
}
MIXTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3-moe": ("qwen3_moe", {**_QWEN3_MOE, "norm_topk_prob": True}),
    "qwen3-moe-dense-layer": (
        "qwen3_moe",
        {**_QWEN3_MOE, "norm_topk_prob": False, "mlp_only_layers": [1], "attention_bias": True},
    ),
    "qwen3-moe-every-second": ("qwen3_moe", {**_QWEN3_MOE, "decoder_sparse_step": 2}),
    "mixtral": ("mixtral", {**_EXPERTS, "num_local_experts": 8, "head_dim": 24}),
    "mixtral-window": ("mixtral", {**_EXPERTS, "num_local_experts": 6, "sliding_window": _WINDOW}),
    "olmoe": ("olmoe", {**_EXPERTS, "num_experts": 8, "norm_topk_prob": False}),
    "olmoe-biased": ("olmoe", {**_EXPERTS, "num_experts": 8, "norm_topk_prob": True, "attention_bias": True}),
    "qwen2-moe": ("qwen2_moe", {**_QWEN2_MOE, "norm_topk_prob": False}),
    "qwen2-moe-dense-layer": (
        "qwen2_moe",
        {**_QWEN2_MOE, "norm_topk_prob": True, "mlp_only_layers": [0], "qkv_bias": False},
    ),
    "granitemoe": (
        "granitemoe",
        {
            **_EXPERTS,
            "num_local_experts": 8,
            "embedding_multiplier": 12.0,
            "attention_multiplier": 0.3,
            "residual_multiplier": 0.7,
            "logits_scaling": 0.8,
        },
    ),
}
GPT_OSS = {
    **_LLAMA,
    "head_dim": 24,
    "intermediate_size": 64,
    "num_local_experts": 8,
    "num_experts_per_tok": 3,
    "sliding_window": _WINDOW,
    "rope_parameters": {**_YARN_ROPE, "truncate": False},
}
MIXTURES |= {
    # A limit that a third of the gates are beyond.
    "gpt-oss": ("gpt_oss", {**GPT_OSS, "swiglu_limit": 0.7, "swiglu_alpha": 1.3}),
    "gpt-oss-plain": (
        "gpt_oss",
        {**GPT_OSS, "attention_bias": False, "layer_types": ["full_attention"] * 3, "rope_parameters": None},
    ),
}
GATED |= MIXTURES
VARIANTS |= GATED

# Families that transformers does not know: name -> (a model_type that it does, its settings, and what the
# config.json says instead).
UNKNOWN: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "prosparse": (
        "llama",
        {**_LLAMA},
        {"model_type": "sparsellama", "hidden_act": "fatrelu", "hidden_act_param": 0.3},
    ),
    "bamboo": (
        "mistral",
        {**_LLAMA, "sliding_window": _WINDOW},
        {"model_type": "bamboo", "hidden_act": "relu"},
    ),
    "minicpm": (
        "granite",
        {
            **_LLAMA,
            "embedding_multiplier": 12.0,
            "attention_multiplier": 0.25,
            "residual_multiplier": 1.4 / math.sqrt(3),
            "logits_scaling": 64 / 48,
        },
        {
            "model_type": "minicpm",
            "hidden_act": "fatrelu",
            "hidden_act_param": 0.3,
            "scale_emb": 12,
            "scale_depth": 1.4,
            "dim_model_base": 48,
        },
    ),
}
EAGER = {"gemma2", "gpt_oss"}  # sdpa has no softcap, and no sinks
DTYPES = ("float32", "float16", "bfloat16")


def make_model(variant: str, dtype: str, seed: int = 0, changes: dict[str, Any] | None = None) -> Any:
    """The transformers model of a variant, with `changes` of its settings, in `dtype`, in evaluation mode.

    Its attention is `sdpa`, the default: transformers' eager Falcon adds the ALiBi bias twice.
    """
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind, settings, said = (*VARIANTS[variant], {}) if variant in VARIANTS else UNKNOWN[variant]
    config = CONFIG_MAPPING[kind](**deepcopy({**settings, **(changes or {})}))
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager" if kind in EAGER else "sdpa")
    if said:
        _sparsify(model, said)
    _randomise(model, torch.Generator().manual_seed(seed))
    for parameter in model.parameters():  # not the rotary frequencies, which are computed in float32
        parameter.data = parameter.data.to(getattr(torch, dtype))
    return model.eval()


def _sparsify(model: Any, said: dict[str, Any]) -> None:
    """Give its FFNs the activation that the family's own code has."""
    threshold, both = said.get("hidden_act_param", 0.0), said["model_type"] == "bamboo"

    def activated(x: torch.Tensor) -> torch.Tensor:
        return torch.where(x > threshold, x, 0.0)

    def forward(mlp: Any, x: torch.Tensor) -> torch.Tensor:
        up = mlp.up_proj(x)
        return mlp.down_proj(activated(mlp.gate_proj(x)) * (activated(up) if both else up))

    for layer in model.model.layers:
        layer.mlp.forward = partial(forward, layer.mlp)


def reference_model(directory: Path) -> Any:
    """The checkpoint as transformers loads it, its weights upcast to float32."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


def _randomise(model: Any, generator: torch.Generator) -> None:
    """Every parameter random: 1-D weights are norms' (1 ± 0.3), 1-D biases ± 0.3."""
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        with torch.no_grad():
            if parameter.ndim == 2 and "embed" in name:
                parameter.copy_(noise * 0.5)
            elif parameter.ndim >= 2:
                parameter.copy_(noise * (1.6 / math.sqrt(parameter.shape[-1])))
            elif name.endswith("bias"):
                parameter.copy_(noise * 0.3)
            else:
                parameter.copy_(1 + noise * 0.3)


def make_tokenizer() -> Tokenizer:
    """Byte-level, no merges: `<s> <pad> </s> <unk>`, then 256 bytes; `</s>` is prepended."""
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    vocabulary = {
        token: index for index, token in enumerate(special + sorted(pre_tokenizers.ByteLevel.alphabet()))
    }
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="</s> $A", pair="</s> $A </s> $B", special_tokens=[("</s>", EOS)]
    )
    return tokenizer


def write_checkpoint(
    directory: Path,
    variant: str = "opt",
    dtype: str = "float32",
    *,
    seed: int = 0,
    sharded: bool = False,
    bin: bool = False,
    changes: dict[str, Any] | None = None,
) -> Path:
    """Write a checkpoint of `VARIANTS[variant]`, with `changes` of its settings, and return its directory.

    `sharded` splits it into several files with an index; `bin` writes `pytorch_model*.bin`.
    """
    model = make_model(variant, dtype, seed, changes)
    directory.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(directory, max_shard_size="100KB" if sharded else "1GB")
    if variant in UNKNOWN:
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        (directory / "config.json").write_text(
            json.dumps({**config, **UNKNOWN[variant][2]}), encoding="utf-8"
        )
    if bin:
        _to_bin(directory)
    make_tokenizer().save(str(directory / "tokenizer.json"))
    return directory


def _to_bin(directory: Path) -> None:
    """Rewrite the safetensors files as `pytorch_model*.bin`: transformers no longer writes them."""
    from safetensors.torch import load_file

    def renamed(name: str) -> str:
        return name.replace("model", "pytorch_model", 1).replace(".safetensors", ".bin")

    for path in sorted(directory.glob("*.safetensors")):
        torch.save(load_file(path), directory / renamed(path.name))
        path.unlink()
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        data = json.loads(index.read_text())
        data["weight_map"] = {name: renamed(file) for name, file in data["weight_map"].items()}
        (directory / "pytorch_model.bin.index.json").write_text(json.dumps(data))
        index.unlink()
