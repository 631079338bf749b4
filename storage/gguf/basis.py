"""What settings are read from, and what all gated decoders' have in common (`settings.py`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from storage.architecture import MOST_LAYERS
from storage.errors import UnsupportedModel
from storage.gguf.header import Metadata, Packed
from storage.gguf.rope import scaling

Config: TypeAlias = dict[str, Any]


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
    def layers(self) -> int:
        """Raises UnsupportedModel for more than any model has."""
        value = self.number("block_count")
        if value > MOST_LAYERS:
            raise UnsupportedModel(f"{self.metadata.path}: {value:,} layers, more than {MOST_LAYERS:,}")
        return value

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


def common(file: File) -> Config:
    embedding = file.tensors.get("token_embd.weight")
    vocabulary = embedding.shape[0] if embedding else file.number("vocab_size")
    return {
        "hidden_size": file.number("embedding_length"),
        "num_hidden_layers": file.layers,
        "num_attention_heads": file.heads,
        "num_key_value_heads": file.kv_heads,
        "max_position_embeddings": file.number("context_length"),
        "vocab_size": vocabulary,
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "bos_token_id": file.metadata.values.get("tokenizer.ggml.bos_token_id"),
    }


def gated(file: File, model_type: str, rope_base: float = 10_000.0) -> Config:
    """What all gated decoders with RMS norms and rotary positions have."""
    if model_type != "phi3" and file.rotated != file.head_dim:
        raise UnsupportedModel(
            f"{file.metadata.path}: a {model_type} model that rotates a part of each head is not supported"
        )
    return {
        "model_type": model_type,
        **common(file),
        "intermediate_size": file.number("feed_forward_length"),
        "head_dim": file.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": file.real("attention.layer_norm_rms_epsilon"),
        "rope_theta": file.real("rope.freq_base", rope_base),
        "rope_scaling": scaling(file.metadata, file.architecture, file.tensors, file.rotated),
        "attention_bias": file.has_tensor("attn_q.bias"),
    }


def granite(file: File) -> Config:
    return {
        **gated(file, "granite"),
        "mlp_bias": file.has_tensor("ffn_up.bias"),
        "attention_multiplier": positive(file, "attention.scale"),
        "embedding_multiplier": positive(file, "embedding_scale"),
        "residual_multiplier": positive(file, "residual_scale"),
        "logits_scaling": positive(file, "logit_scale"),
    }


def positive(file: File, key: str) -> float | None:
    """None, which is the family's own default, where the file has nothing or 0."""
    return file.real(key, 0.0) or None
