"""A GGUF file's metadata as the `config.json` that a checkpoint of the same model has.

What a file does not say is what llama.cpp takes for granted of its architecture, and stands here with the
architecture. Raises CheckpointError for metadata that are missing or make no sense, UnsupportedModel for an
architecture or an option that is not supported.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from storage.errors import UnsupportedModel
from storage.gguf.header import Metadata, Packed
from storage.gguf.rope import scaling

Config: TypeAlias = dict[str, Any]

SOFTMAX, SIGMOID = 1, 2  # how weights are made of a router's logits
GEMMA2_27B, GEMMA3_27B = 46, 62  # layers: these two divide by the root of d_model / heads, not of the head


@dataclass(frozen=True, slots=True)
class File:
    """What settings are read from."""

    metadata: Metadata
    architecture: str
    tensors: Mapping[str, Packed]

    @classmethod
    def of(cls, metadata: Metadata, packed: tuple[Packed, ...]) -> File:
        return cls(
            metadata, metadata.text("general.architecture"), {tensor.name: tensor for tensor in packed}
        )

    def number(self, key: str, default: int | None = None) -> int:
        return self.metadata.number(f"{self.architecture}.{key}", default)

    def real(self, key: str, default: float | None = None) -> float:
        return self.metadata.real(f"{self.architecture}.{key}", default)

    def has(self, key: str) -> bool:
        return self.metadata.has(f"{self.architecture}.{key}")

    def has_tensor(self, part: str) -> bool:
        return f"blk.0.{part}" in self.tensors

    @property
    def heads(self) -> int:
        return self.number("attention.head_count")

    @property
    def kv_heads(self) -> int:
        return self.number("attention.head_count_kv", self.heads)

    @property
    def head_dim(self) -> int:
        return self.number("attention.key_length", self.number("embedding_length") // max(self.heads, 1))

    @property
    def rotated(self) -> int:
        """Dimensions of a head that turn with the position."""
        return self.number("rope.dimension_count", self.head_dim)


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


def _common(file: File) -> Config:
    embedding = file.tensors.get("token_embd.weight")
    vocabulary = embedding.shape[0] if embedding else file.number("vocab_size")
    return {
        "hidden_size": file.number("embedding_length"),
        "num_hidden_layers": file.number("block_count"),
        "num_attention_heads": file.heads,
        "num_key_value_heads": file.kv_heads,
        "max_position_embeddings": file.number("context_length"),
        "vocab_size": vocabulary,
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "bos_token_id": file.metadata.values.get("tokenizer.ggml.bos_token_id"),
    }


def _gated(file: File, model_type: str, rope_base: float = 10_000.0) -> Config:
    """What all gated decoders with RMS norms and rotary positions have."""
    if model_type != "phi3" and file.rotated != file.head_dim:
        raise UnsupportedModel(
            f"{file.metadata.path}: a {model_type} model that rotates a part of each head is not supported"
        )
    return {
        "model_type": model_type,
        **_common(file),
        "intermediate_size": file.number("feed_forward_length"),
        "head_dim": file.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": file.real("attention.layer_norm_rms_epsilon"),
        "rope_theta": file.real("rope.freq_base", rope_base),
        "rope_scaling": scaling(file.metadata, file.architecture, file.tensors, file.rotated),
        "attention_bias": file.has_tensor("attn_q.bias"),
    }


def _llama(file: File) -> Config:
    """Mistral's files say llama, too, and Mixtral's; what tells them apart are the window and the experts."""
    window = file.number("attention.sliding_window", 0)
    if file.number("expert_count", 0):
        _always(file)
        return {
            **_gated(file, "mixtral"),
            **_counts(file, "num_local_experts"),
            "sliding_window": window or None,
        }
    kind = "mistral" if window else "llama"
    return {
        **_gated(file, kind),
        "mlp_bias": file.has_tensor("ffn_up.bias"),
        "sliding_window": window or None,
    }


def _qwen2(file: File) -> Config:
    return {**_gated(file, "qwen2"), "use_sliding_window": False}


def _qwen3(file: File) -> Config:
    return {**_gated(file, "qwen3"), "use_sliding_window": False}


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


def _qwen3moe(file: File) -> Config:
    return {
        **_gated(file, "qwen3_moe"),
        **_counts(file, "num_experts"),
        "use_sliding_window": False,
        "moe_intermediate_size": _expert_width(file),
        "norm_topk_prob": _softmax(file, renormalised=True),
    }


def _qwen2moe(file: File) -> Config:
    shared = file.number("expert_shared_feed_forward_length", 0) or file.number("feed_forward_length")
    return {
        **_gated(file, "qwen2_moe"),
        **_counts(file, "num_experts"),
        "use_sliding_window": False,
        "qkv_bias": file.has_tensor("attn_q.bias"),
        "moe_intermediate_size": _expert_width(file),
        "shared_expert_intermediate_size": shared,
        "norm_topk_prob": _softmax(file, renormalised=False),
    }


def _olmoe(file: File) -> Config:
    return {
        **_gated(file, "olmoe"),
        **_counts(file, "num_experts"),
        "clip_qkv": _positive(file, "attention.clamp_kqv"),
        "norm_topk_prob": _softmax(file, renormalised=False),
    }


def _granitemoe(file: File) -> Config:
    _always(file)
    if file.has_tensor("ffn_up_shexp.weight"):
        raise UnsupportedModel(
            f"{file.metadata.path}: a Granite mixture with a shared expert is not supported"
        )
    return {**_granite(file), **_counts(file, "num_local_experts"), "model_type": "granitemoe"}


def _smallthinker(file: File) -> Config:
    """With a window every fourth layer, the first among them, sees everything and has no rotary positions."""
    window, layers = file.number("attention.sliding_window", 0), range(file.number("block_count"))
    local = [int(bool(window) and layer % 4 != 0) for layer in layers]
    function = file.number("expert_gating_func", SIGMOID)
    if function not in {SOFTMAX, SIGMOID}:
        raise UnsupportedModel(
            f"{file.metadata.path}: experts' weights by function {function} are not supported"
        )
    return {
        **_gated(file, "smallthinker", 1e6),
        "sliding_window_size": window or None,
        "sliding_window_layout": local,
        "rope_layout": local if window else [1] * len(layers),
        "moe_num_primary_experts": file.number("expert_count"),
        "moe_num_active_primary_experts": file.number("expert_used_count"),
        "moe_ffn_hidden_size": _expert_width(file),
        "moe_primary_router_apply_softmax": function == SOFTMAX,
    }


def _gpt_oss(file: File) -> Config:
    """The gates' limit and the ramp of rotary frequencies are the architecture's own."""
    found = _gated(file, "gpt_oss", 150_000.0)
    scaled = found["rope_scaling"]
    return {
        **found,
        "rope_scaling": scaled and {**scaled, "truncate": False},
        **_counts(file, "num_local_experts"),
        "intermediate_size": file.number("expert_feed_forward_length"),
        "sliding_window": file.number("attention.sliding_window", 128),
    }


def _gemma(file: File, model_type: str, large: int) -> Config:
    """`large`: the number of layers of the one size whose scale is not the head's."""
    whole = file.number("block_count") == large
    per_head = file.number("embedding_length") // max(file.heads, 1)
    return {
        **_gated(file, model_type),
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
        "final_logit_softcapping": _positive(file, "final_logit_softcapping"),
    }


def _phi3(file: File) -> Config:
    longest = file.number("context_length")
    return {
        **_gated(file, "phi3"),
        "partial_rotary_factor": file.rotated / max(file.head_dim, 1),
        "original_max_position_embeddings": file.number("rope.scaling.original_context_length", longest),
        "sliding_window": file.number("attention.sliding_window", 0) or None,
    }


def _smollm3(file: File) -> Config:
    """Every fourth layer has no rotary positions; the file does not say so."""
    layers = range(file.number("block_count"))
    return {**_gated(file, "smollm3"), "no_rope_layers": [int((layer + 1) % 4 != 0) for layer in layers]}


def _olmo2(file: File) -> Config:
    return _gated(file, "olmo2")


def _granite(file: File) -> Config:
    return {
        **_gated(file, "granite"),
        "mlp_bias": file.has_tensor("ffn_up.bias"),
        "attention_multiplier": _positive(file, "attention.scale"),
        "embedding_multiplier": _positive(file, "embedding_scale"),
        "residual_multiplier": _positive(file, "residual_scale"),
        "logits_scaling": _positive(file, "logit_scale"),
    }


def _falcon(file: File) -> Config:
    """Without `attn_norm_2` and with more than one key-value head: Falcon-11b, one norm for both."""
    two_norms, kv_heads = file.has_tensor("attn_norm_2.weight"), file.kv_heads
    grouped = two_norms or kv_heads > 1
    return {
        "model_type": "falcon",
        **_common(file),
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


def _positive(file: File, key: str) -> float | None:
    """None, which is the family's own default, where the file has nothing or 0."""
    return file.real(key, 0.0) or None


MIXTURES = ("llama", "qwen3moe", "qwen2moe", "olmoe", "granitemoe", "gpt-oss", "smallthinker")
ARCHITECTURES: dict[str, Callable[[File], Config]] = {
    "llama": _llama,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "qwen3moe": _qwen3moe,
    "qwen2moe": _qwen2moe,
    "olmoe": _olmoe,
    "granitemoe": _granitemoe,
    "gpt-oss": _gpt_oss,
    "smallthinker": _smallthinker,
    "gemma2": _gemma2,
    "gemma3": _gemma3,
    "phi3": _phi3,
    "smollm3": _smollm3,
    "olmo2": _olmo2,
    "granite": _granite,
    "falcon": _falcon,
}
