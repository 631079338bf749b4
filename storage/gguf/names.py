"""Which tensor of a GGUF file is which of a checkpoint's, by architecture, and what its converter changed.

The file's names are llama.cpp's, the checkpoint's those that transformers' classes give. The converter
(convert_hf_to_gguf.py) changed four things, each undone here:

- rows of queries and keys: rotary pairs lie side by side in the file, half a head apart in a checkpoint
  (llama, granite, granitemoe, smollm3);
- rows of Falcon's fused projection: all queries, keys, values in the file; by group in a checkpoint;
- Gemma's norms, which compute with 1 + w: the file holds 1 + w, the checkpoint w;
- a layer's experts, which are stacked in one tensor: each is a part of it here. Files of the first mixtures
  have them one by one, as checkpoints do.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from storage.gguf.header import Packed

Rows: TypeAlias = npt.NDArray[np.int64]  # of the file, in the order of the checkpoint's

ROPE_FACTORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")

_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_SPLIT = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_FUSED = {
    "attn_qkv": "self_attn.qkv_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_up": "mlp.gate_up_proj",
    "ffn_down": "mlp.down_proj",
}
_NORMS = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
_SANDWICH = {
    "attn_norm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_HEAD_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_AFTER = {
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
# A mixture's, below its block; `{}` is an expert's number.
_EXPERTS = {role: f"mlp.experts.{{}}.{role}_proj" for role in ("gate", "up", "down")}
_MIXTRAL = {"gate": "w1", "up": "w3", "down": "w2"}
_SHARED = {f"ffn_{role}_shexp": f"mlp.shared_expert.{role}_proj" for role in _EXPERTS} | {
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate"
}
_NAKED = {"attn_sinks": "self_attn.sinks"}  # without `.weight` in a checkpoint
_STACK = re.compile(r"ffn_(gate|up|down)_exps")
_ALONE = re.compile(r"ffn_(gate|up|down)\.(\d+)")
_FLOATS = ("ffn_gate_inp", "ffn_gate_inp_shexp")  # never in few bits, and never rounded with the others


@dataclass(frozen=True, slots=True)
class Naming:
    """One architecture's names, without `.weight` or `.bias`, and what its converter changed."""

    parts: Mapping[str, str]  # of a layer
    top: Mapping[str, str]
    layers: str = "model.layers"
    experts: Mapping[str, str] | None = None  # of a mixture, by role
    pairs: bool = False  # rotary pairs lie side by side
    grouped: bool = False  # the fused projection is Falcon's
    one_added: bool = False  # to norms


NAMINGS: dict[str, Naming] = {
    "llama": Naming(
        {**_SPLIT, **_NORMS, "ffn_gate_inp": "block_sparse_moe.gate"},
        _TOP,
        experts={role: f"block_sparse_moe.experts.{{}}.{name}" for role, name in _MIXTRAL.items()},
        pairs=True,
    ),
    "qwen2": Naming({**_SPLIT, **_NORMS}, _TOP),
    "qwen3": Naming({**_SPLIT, **_NORMS, **_HEAD_NORMS}, _TOP),
    "qwen3moe": Naming(
        {**_SPLIT, **_NORMS, **_HEAD_NORMS, "ffn_gate_inp": "mlp.gate"}, _TOP, experts=_EXPERTS
    ),
    "qwen2moe": Naming({**_SPLIT, **_NORMS, **_SHARED, "ffn_gate_inp": "mlp.gate"}, _TOP, experts=_EXPERTS),
    "olmoe": Naming({**_SPLIT, **_NORMS, **_HEAD_NORMS, "ffn_gate_inp": "mlp.gate"}, _TOP, experts=_EXPERTS),
    "granitemoe": Naming(
        {**_SPLIT, **_NORMS, "ffn_gate_inp": "block_sparse_moe.router.layer"},
        _TOP,
        experts={role: name.replace("mlp", "block_sparse_moe") for role, name in _EXPERTS.items()},
        pairs=True,
    ),
    "smallthinker": Naming(
        {**_SPLIT, **_NORMS, "ffn_gate_inp": "block_sparse_moe.primary_router"},
        _TOP,
        experts={role: f"block_sparse_moe.experts.{{}}.{role}" for role in _EXPERTS},
    ),
    "gpt-oss": Naming(
        {
            **_SPLIT,
            "attn_norm": "input_layernorm",
            "post_attention_norm": "post_attention_layernorm",
            "ffn_gate_inp": "mlp.router",
        },
        _TOP,
        experts=_EXPERTS,
    ),
    "gemma2": Naming({**_SPLIT, **_SANDWICH}, _TOP, one_added=True),
    "gemma3": Naming({**_SPLIT, **_SANDWICH, **_HEAD_NORMS}, _TOP, one_added=True),
    "phi3": Naming({**_FUSED, **_NORMS}, _TOP),
    "smollm3": Naming({**_SPLIT, **_NORMS}, _TOP, pairs=True),
    "olmo2": Naming({**_SPLIT, **_AFTER, **_HEAD_NORMS}, _TOP),
    "granite": Naming({**_SPLIT, **_NORMS}, _TOP, pairs=True),
    "falcon": Naming(
        {
            "attn_norm": "input_layernorm",
            "attn_qkv": "self_attention.query_key_value",
            "attn_output": "self_attention.dense",
            "ffn_up": "mlp.dense_h_to_4h",
            "ffn_down": "mlp.dense_4h_to_h",
        },
        {"token_embd": "transformer.word_embeddings", "output_norm": "transformer.ln_f", "output": "lm_head"},
        layers="transformer.h",
        grouped=True,
    ),
}
# With `attn_norm_2` in the file: Falcon-40b's two norms of a block, under names of their own.
_TWO_NORMS = {"attn_norm": "ln_mlp", "attn_norm_2": "ln_attn"}


@dataclass(frozen=True, slots=True)
class Heads:
    """Of every layer's attention."""

    queries: int
    keys: int


@dataclass(frozen=True, slots=True)
class Restored:
    """A tensor of the file under the checkpoint's name, and how it becomes the checkpoint's."""

    name: str
    packed: Packed
    order: Rows | None = None
    subtracted: float = 0.0

    @property
    def matrix(self) -> bool:
        """Whether it shares the dtype that a store's matrices have. Vectors, routers and biases do not."""
        part, _, kind = self.packed.name.partition(".")[2].partition(".")[2].rpartition(".")
        return len(self.packed.shape) > 1 and kind != "bias" and part not in _FLOATS


def restored(architecture: str, tensors: tuple[Packed, ...], heads: Heads) -> dict[str, Restored]:
    """By the checkpoint's names. A tensor that has none keeps its own; rope factors are left out."""
    naming = NAMINGS[architecture]
    names = {tensor.name for tensor in tensors}
    parts = dict(naming.parts)
    if naming.grouped and "blk.0.attn_norm_2.weight" in names:
        parts |= _TWO_NORMS
    found = (
        Restored(
            name,
            part,
            _order(naming, part, heads),
            1.0 if naming.one_added and tensor.name.endswith("norm.weight") else 0.0,
        )
        for tensor in tensors
        if tensor.name not in ROPE_FACTORS
        for name, part in _named(naming, parts, tensor)
    )
    return {item.name: item for item in found}


def _named(naming: Naming, parts: Mapping[str, str], tensor: Packed) -> Iterator[tuple[str, Packed]]:
    """The tensor under the checkpoint's name; of a stack its experts, each as a matrix of its own."""
    stem, _, kind = tensor.name.rpartition(".")
    block, _, rest = stem.partition(".")
    index, _, part = rest.partition(".")
    inside = block == "blk" and index.isdecimal()
    below = f"{naming.layers}.{index}"
    if stem in naming.top:
        yield f"{naming.top[stem]}.{kind}", tensor
    elif inside and part in _NAKED:
        yield f"{below}.{_NAKED[part]}", tensor
    elif inside and part in parts:
        whole = (
            (1, *tensor.shape) if part == "ffn_gate_inp_shexp" and len(tensor.shape) == 1 else tensor.shape
        )
        yield f"{below}.{parts[part]}.{kind}", replace(tensor, shape=whole)
    elif inside and naming.experts and (stack := _STACK.fullmatch(part)):
        name = f"{below}.{naming.experts[stack[1]]}.{kind}"
        if kind == "bias":
            yield name.replace(".{}", ""), tensor
        else:
            yield from _stacked(name, tensor)
    elif inside and naming.experts and (alone := _ALONE.fullmatch(part)):
        yield f"{below}.{naming.experts[alone[1]].format(alone[2])}.{kind}", tensor
    else:
        yield tensor.name, tensor


def _stacked(name: str, tensor: Packed) -> Iterator[tuple[str, Packed]]:
    """Of a type that is not known, and of a wrong shape, one: it is refused where it is asked for."""
    if not tensor.known or len(tensor.shape) != 3:
        yield name.format(0), tensor
        return
    size = tensor.shape[1] * tensor.row_bytes
    for expert in range(tensor.shape[0]):
        yield (
            name.format(expert),
            replace(tensor, shape=tensor.shape[1:], offset=tensor.offset + expert * size),
        )


def _order(naming: Naming, tensor: Packed, heads: Heads) -> Rows | None:
    part = tensor.name.rpartition(".")[0].rpartition(".")[2]
    if naming.pairs and part in {"attn_q", "attn_k"}:
        order: Callable[[int, Heads], Rows | None] = (
            _halves_of_queries if part == "attn_q" else _halves_of_keys
        )
    elif naming.grouped and part == "attn_qkv":
        order = _groups
    else:
        return None
    return order(tensor.shape[0], heads)


def _halves_of_queries(rows: int, heads: Heads) -> Rows | None:
    return _halves(rows, heads.queries)


def _halves_of_keys(rows: int, heads: Heads) -> Rows | None:
    return _halves(rows, heads.keys)


def _halves(rows: int, count: int) -> Rows | None:
    """(head, pair, half) in the file -> (head, half, pair). None for rows that are no such heads."""
    if rows % (2 * count):
        return None  # a shape that the family refuses
    return np.arange(rows).reshape(count, -1, 2).swapaxes(1, 2).reshape(-1)


def _groups(rows: int, heads: Heads) -> Rows | None:
    """Queries, keys, values in the file -> by key-value head: its queries, its key, its value."""
    width, rest = divmod(rows, heads.queries + 2 * heads.keys)
    if rest or heads.queries % heads.keys:
        return None  # a shape that the family refuses
    queries, keys, values = np.split(
        np.arange(rows), (heads.queries * width, (heads.queries + heads.keys) * width)
    )
    groups = [part.reshape(heads.keys, -1, width) for part in (queries, keys, values)]
    return np.concatenate(groups, axis=1).reshape(-1)
