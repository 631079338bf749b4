"""A GGUF file's metadata as the `config.json` that a checkpoint of the same model has.

What a file does not say is what llama.cpp takes for granted of its architecture, and stands here with the
architecture. Raises CheckpointError for metadata that are missing or make no sense, UnsupportedModel for an
architecture or an option that is not supported.
"""

from __future__ import annotations

from collections.abc import Callable

from storage.errors import UnsupportedModel
from storage.gguf import mixtures
from storage.gguf.basis import Config, File, common, gated, granite, positive

GEMMA2_27B, GEMMA3_27B = 46, 62  # layers: these two divide by the root of d_model / heads, not of the head


def config(file: File) -> Config:
    """Raises UnsupportedModel naming the architecture, and those that are supported."""
    if file.architecture not in ARCHITECTURES:
        raise UnsupportedModel(
            f"{file.metadata.path}: GGUF files of the architecture {file.architecture!r} are not supported; "
            f"supported are {', '.join(ARCHITECTURES)}"
        )
    if file.number("expert_count", 0) and file.architecture not in MIXTURES:
        raise UnsupportedModel(
            f"{file.metadata.path}: a mixture of experts of the architecture {file.architecture!r} is not "
            f"supported; supported are {', '.join(MIXTURES)}"
        )
    settings = ARCHITECTURES[file.architecture](file)
    return {key: value for key, value in settings.items() if value is not None}


def _llama(file: File) -> Config:
    """Mistral's files say llama, too, and Mixtral's; what tells them apart are the window and the experts."""
    window = file.number("attention.sliding_window", 0)
    if file.number("expert_count", 0):
        return mixtures.mixtral(file)
    kind = "mistral" if window else "llama"
    return {
        **gated(file, kind),
        "mlp_bias": file.has_tensor("ffn_up.bias"),
        "sliding_window": window or None,
    }


def _qwen2(file: File) -> Config:
    return {**gated(file, "qwen2"), "use_sliding_window": False}


def _qwen3(file: File) -> Config:
    return {**gated(file, "qwen3"), "use_sliding_window": False}


def _gemma(file: File, model_type: str, large: int) -> Config:
    """`large`: the number of layers of the one size whose scale is not the head's."""
    whole = file.layers == large
    per_head = file.number("embedding_length") // max(file.heads, 1)
    return {
        **gated(file, model_type),
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": per_head if whole else file.head_dim,
    }


def _gemma2(file: File) -> Config:
    return {
        **_gemma(file, "gemma2", GEMMA2_27B),
        "sliding_window": file.number("attention.sliding_window", 4096),
        "attn_logit_softcapping": file.real("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": file.real("final_logit_softcapping", 30.0),
    }


def _gemma3(file: File) -> Config:
    return {
        **_gemma(file, "gemma3_text", GEMMA3_27B),
        "rope_theta": file.real("rope.freq_base", 1_000_000.0),
        "rope_local_base_freq": file.real("rope.freq_base_swa", 10_000.0),
        "sliding_window": file.number("attention.sliding_window"),
        "sliding_window_pattern": file.number("attention.sliding_window_pattern", 6),
        "final_logit_softcapping": positive(file, "final_logit_softcapping"),
    }


def _phi3(file: File) -> Config:
    longest = file.number("context_length")
    return {
        **gated(file, "phi3"),
        "partial_rotary_factor": file.rotated / max(file.head_dim, 1),
        "original_max_position_embeddings": file.number("rope.scaling.original_context_length", longest),
        "sliding_window": file.number("attention.sliding_window", 0) or None,
    }


def _smollm3(file: File) -> Config:
    """Every fourth layer has no rotary positions; the file does not say so."""
    layers = range(file.layers)
    return {**gated(file, "smollm3"), "no_rope_layers": [int((layer + 1) % 4 != 0) for layer in layers]}


def _olmo2(file: File) -> Config:
    return gated(file, "olmo2")


def _falcon(file: File) -> Config:
    """Without `attn_norm_2` and with more than one key-value head: Falcon-11b, one norm for both."""
    two_norms, kv_heads = file.has_tensor("attn_norm_2.weight"), file.kv_heads
    grouped = two_norms or kv_heads > 1
    return {
        "model_type": "falcon",
        **common(file),
        "num_kv_heads": kv_heads,
        "ffn_hidden_size": file.number("feed_forward_length"),
        "layer_norm_epsilon": file.real("attention.layer_norm_epsilon"),
        "rope_theta": file.real("rope.freq_base", 10_000.0),
        "new_decoder_architecture": grouped,
        "multi_query": not grouped,
        "num_ln_in_parallel_attn": (2 if two_norms else 1) if grouped else None,
        "parallel_attn": True,
        "alibi": False,
        "bias": file.has_tensor("attn_qkv.bias"),
    }


MIXTURES = ("llama", "qwen3moe", "qwen2moe", "olmoe", "granitemoe", "gpt-oss", "smallthinker")
ARCHITECTURES: dict[str, Callable[[File], Config]] = {
    "llama": _llama,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "qwen3moe": mixtures.qwen3moe,
    "qwen2moe": mixtures.qwen2moe,
    "olmoe": mixtures.olmoe,
    "granitemoe": mixtures.granitemoe,
    "gpt-oss": mixtures.gpt_oss,
    "smallthinker": mixtures.smallthinker,
    "gemma2": _gemma2,
    "gemma3": _gemma3,
    "phi3": _phi3,
    "smollm3": _smollm3,
    "olmo2": _olmo2,
    "granite": granite,
    "falcon": _falcon,
}
