"""Settings of mixtures of experts, as `settings.py` has those of others.

Weights are made by softmax where nothing else is said. What a file does not say is llama.cpp's own default:
whether an architecture's weights are divided by their sum, and how wide an expert is.
"""

from __future__ import annotations

from storage.errors import UnsupportedModel
from storage.gguf.basis import Config, File, gated, granite, positive

SOFTMAX, SIGMOID = 1, 2  # how weights are made of a router's logits


def mixtral(file: File) -> Config:
    _always(file)
    return {
        **gated(file, "mixtral"),
        **_counts(file, "num_local_experts"),
        "sliding_window": file.number("attention.sliding_window", 0) or None,
    }


def _counts(file: File, key: str) -> Config:
    """How many experts there are, under this key, and how many a token has."""
    return {key: file.number("expert_count"), "num_experts_per_tok": file.number("expert_used_count")}


def _expert_width(file: File) -> int:
    """Neurons of one expert. Where no number is its own, the FFN's is that of all that a token has."""
    found = file.number("expert_feed_forward_length", 0)
    return found or file.number("feed_forward_length") // max(file.number("expert_used_count"), 1)


def _softmax(file: File, renormalised: bool) -> bool:
    """Whether the chosen experts' weights are divided by their sum, `renormalised` where the file is silent.

    Raises UnsupportedModel for weights that are made in another way than the architecture's.
    """
    if file.number("expert_gating_func", 0) not in {0, SOFTMAX}:
        raise UnsupportedModel(
            f"{file.metadata.path}: experts' weights other than by softmax are not supported"
        )
    if file.real("expert_weights_scale", 0.0) not in {0.0, 1.0}:
        raise UnsupportedModel(f"{file.metadata.path}: experts' weights that are scaled are not supported")
    return file.metadata.flag(f"{file.architecture}.expert_weights_norm", renormalised)


def _always(file: File) -> None:
    """Raises UnsupportedModel for weights that are not divided by their sum, as the architecture's are."""
    if not _softmax(file, renormalised=True):
        raise UnsupportedModel(
            f"{file.metadata.path}: experts' weights that do not sum to one are not supported"
        )


def qwen3moe(file: File) -> Config:
    return {
        **gated(file, "qwen3_moe"),
        **_counts(file, "num_experts"),
        "use_sliding_window": False,
        "moe_intermediate_size": _expert_width(file),
        "norm_topk_prob": _softmax(file, renormalised=True),
    }


def qwen2moe(file: File) -> Config:
    shared = file.number("expert_shared_feed_forward_length", 0) or file.number("feed_forward_length")
    return {
        **gated(file, "qwen2_moe"),
        **_counts(file, "num_experts"),
        "use_sliding_window": False,
        "qkv_bias": file.has_tensor("attn_q.bias"),
        "moe_intermediate_size": _expert_width(file),
        "shared_expert_intermediate_size": shared,
        "norm_topk_prob": _softmax(file, renormalised=False),
    }


def olmoe(file: File) -> Config:
    return {
        **gated(file, "olmoe"),
        **_counts(file, "num_experts"),
        "clip_qkv": positive(file, "attention.clamp_kqv"),
        "norm_topk_prob": _softmax(file, renormalised=False),
    }


def granitemoe(file: File) -> Config:
    _always(file)
    if file.has_tensor("ffn_up_shexp.weight"):
        raise UnsupportedModel(
            f"{file.metadata.path}: a Granite mixture with a shared expert is not supported"
        )
    return {**granite(file), **_counts(file, "num_local_experts"), "model_type": "granitemoe"}


def smallthinker(file: File) -> Config:
    """With a window every fourth layer, the first among them, sees everything and has no rotary positions."""
    window, layers = file.number("attention.sliding_window", 0), range(file.layers)
    local = [int(bool(window) and layer % 4 != 0) for layer in layers]
    function = file.number("expert_gating_func", SIGMOID)
    if function not in {SOFTMAX, SIGMOID}:
        raise UnsupportedModel(
            f"{file.metadata.path}: experts' weights by function {function} are not supported"
        )
    return {
        **gated(file, "smallthinker", 1e6),
        "sliding_window_size": window or None,
        "sliding_window_layout": local,
        "rope_layout": local if window else [1] * len(layers),
        "moe_num_primary_experts": file.number("expert_count"),
        "moe_num_active_primary_experts": file.number("expert_used_count"),
        "moe_ffn_hidden_size": _expert_width(file),
        "moe_primary_router_apply_softmax": function == SOFTMAX,
    }


def gpt_oss(file: File) -> Config:
    """The gates' limit and the ramp of rotary frequencies are the architecture's own."""
    found = gated(file, "gpt_oss", 150_000.0)
    scaled = found["rope_scaling"] or {"rope_type": "default"}
    return {
        **found,
        "rope_scaling": {**scaled, "truncate": False},
        **_counts(file, "num_local_experts"),
        "intermediate_size": file.number("expert_feed_forward_length"),
        "sliding_window": file.number("attention.sliding_window", 128),
    }
