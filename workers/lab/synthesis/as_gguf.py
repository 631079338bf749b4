"""A checkpoint of Llama's form, or of Falcon-7B's, as a GGUF file: equal weights for other programs.

All matrices have one type, of those that the package `gguf` can quantise to itself: no K-quants. Names, keys
and the order of queries' and keys' rows are those of llama.cpp's converter. Vectors stay float32.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType, GGUFWriter, RopeScalingType, TokenType

from storage.architecture import Architecture, Attention, Llama3Scaling, YarnScaling
from storage.checkpoint import Checkpoint
from storage.codecs import F32, widen
from storage.errors import CheckpointError, UnsupportedModel, UsageError
from storage.families.registry import family_of
from storage.files import TEMPORARY, publish
from workers.compute.positions import frequencies
from workers.lab.synthesis.space import check_space

TYPES = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1")
PAIRED = {"llama": True, "qwen3": False, "falcon": False}  # rotary pairs lie side by side in the file
ACTIVATION = {"llama": "silu", "qwen3": "silu", "falcon": "gelu"}  # the one that a reader assumes
CHUNK = 1 << 24  # values quantised at once
TOKENIZER = "tokenizer.json"

Bytes = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor of the file."""

    name: str
    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    packed: Callable[[], Bytes]  # its data as the file has them

    @property
    def bytes_shape(self) -> tuple[int, ...]:
        found: tuple[int, ...] = gguf.quant_shape_to_byte_shape(self.shape, self.kind)
        return found

    @property
    def size(self) -> int:
        """Bytes."""
        return math.prod(self.bytes_shape)

    @classmethod
    def quantised(
        cls, name: str, shape: tuple[int, ...], kind: GGMLQuantizationType, read: Callable[[int, int], F32]
    ) -> Tensor:
        """`read` gives lines [start, stop) of its values."""

        def packed() -> Bytes:
            lines, width = shape[0], math.prod(shape[1:])
            made = np.empty(
                (lines, math.prod(gguf.quant_shape_to_byte_shape(shape, kind)) // lines), np.uint8
            )
            step = max(1, CHUNK // width)
            for start in range(0, lines, step):
                stop = min(start + step, lines)
                part = gguf.quantize(read(start, stop).reshape(stop - start, width), kind)
                made[start:stop] = part.view(np.uint8).reshape(stop - start, -1)
            return made

        return cls(name, shape, kind, packed)


def write(directory: Path, out: Path, kind: str, progress: Callable[[int, int], None] | None = None) -> None:
    """Write the checkpoint in `directory` to the file `out`; `progress` gets bytes written, of all.

    Raises UsageError for an unknown type and for a file that is there, UnsupportedModel for a model that is
    of neither form or has another activation than its family's, CheckpointError, and DiskFull before writing
    more than fits.
    """
    if kind not in TYPES:
        raise UsageError(f"--type must be one of {', '.join(TYPES)}, not {kind!r}")
    if out.exists():
        raise UsageError(f"{out} exists: choose another file")
    checkpoint = Checkpoint.open(directory)
    model = family_of(checkpoint.config).architecture(checkpoint.config)
    if model.activation != ACTIVATION.get(model.family):
        known = ", ".join(f"{family} with {activation}" for family, activation in ACTIVATION.items())
        raise UnsupportedModel(
            f"{directory} is a {model.family} model with {model.activation}; only {known} can be written "
            "as GGUF"
        )
    if checkpoint.config.get("new_decoder_architecture"):
        raise UnsupportedModel(f"{directory} has grouped queries, keys and values, which are not written")
    tensors = _tensors(checkpoint, model, GGMLQuantizationType[kind])
    name, tokenizer = str(checkpoint.config.get("_name_or_path", checkpoint.path.name)), directory / TOKENIZER

    def about(writer: GGUFWriter) -> None:
        describe(writer, name, model, model.layers[0].ffn.neurons, tokenizer)

    write_file(out, model.family, about, tensors, progress)


def write_file(
    out: Path,
    architecture: str,
    about: Callable[[GGUFWriter], None],
    tensors: Sequence[Tensor],
    progress: Callable[[int, int], None] | None,
) -> None:
    """Write a whole file, or none; `about` adds its metadata. Raises DiskFull before more than fits."""
    total = sum(tensor.size for tensor in tensors)
    check_space(total, out, "the GGUF file")
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(out.name + TEMPORARY)
    try:
        with contextlib.closing(GGUFWriter(partial, architecture)) as writer:
            about(writer)
            for tensor in tensors:
                writer.add_tensor_info(
                    tensor.name, tensor.bytes_shape, np.dtype(np.uint8), tensor.size, raw_dtype=tensor.kind
                )
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            done = 0
            for tensor in tensors:
                writer.write_tensor_data(tensor.packed())
                done += tensor.size
                if progress is not None:
                    progress(done, total)
        publish(partial, out)
    finally:
        partial.unlink(missing_ok=True)


def _tensors(checkpoint: Checkpoint, model: Architecture, kind: GGMLQuantizationType) -> list[Tensor]:
    number = next(index for index, name in gguf.MODEL_ARCH_NAMES.items() if name == model.family)
    names = gguf.get_tensor_name_map(number, len(model.layers))
    found = list(_rope_factors(model))
    for name, entry in checkpoint.entries.items():
        theirs = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if theirs is None:
            raise CheckpointError(f"GGUF has no name for the tensor {name}")
        matrix = len(entry.shape) > 1
        if matrix and entry.shape[-1] % gguf.GGML_QUANT_SIZES[kind][0]:
            raise UsageError(
                f"{name} has rows of {entry.shape[-1]}, which are no whole blocks of {kind.name}"
            )
        order = _order(model, name, entry.shape[0])
        read = _reader(checkpoint, name, entry.dtype, order)
        form = kind if matrix else GGMLQuantizationType.F32
        found.append(Tensor.quantised(theirs, entry.shape, form, read))
    return found


def _reader(
    checkpoint: Checkpoint, name: str, dtype: str, order: npt.NDArray[np.int64] | None
) -> Callable[[int, int], F32]:
    def read(start: int, stop: int) -> F32:
        if order is None:
            return widen(checkpoint.read(name, start, stop), dtype)
        return widen(checkpoint.read(name)[order[start:stop]], dtype)

    return read


def _order(model: Architecture, name: str, rows: int) -> npt.NDArray[np.int64] | None:
    """The checkpoint's row at each of the file's: of a head, pair by pair instead of half by half."""
    attention = model.layers[0].attention
    heads = {"q_proj": attention.heads, "k_proj": attention.kv_heads}.get(name.split(".")[-2])
    if heads is None or not PAIRED[model.family]:
        return None
    return paired(np.arange(rows), heads)


def paired(rows: npt.NDArray[np.int64], heads: int) -> npt.NDArray[np.int64]:
    """Rows of queries or keys with the two of each rotary pair side by side."""
    return rows.reshape(heads, 2, -1).swapaxes(1, 2).reshape(-1)


def _rope_factors(model: Architecture) -> Iterator[Tensor]:
    """What Llama 3 divides its angles by."""
    attention = model.layers[0].attention
    rope = attention.rope
    if rope is None or not isinstance(rope.scaling, Llama3Scaling):
        return
    plain = frequencies(replace(rope, scaling=None), attention.head_dim, 1)
    factors = plain / frequencies(rope, attention.head_dim, 1)
    yield Tensor.quantised(
        "rope_freqs.weight", factors.shape, GGMLQuantizationType.F32, lambda start, stop: factors[start:stop]
    )


def describe(writer: GGUFWriter, name: str, model: Architecture, neurons: int, tokenizer: Path) -> None:
    """What every decoder says of itself; `neurons` of an FFN, or of an expert."""
    attention, norm = model.layers[0].attention, model.final_norm
    assert norm is not None
    writer.add_name(name)
    writer.add_block_count(len(model.layers))
    writer.add_context_length(model.max_positions)
    writer.add_embedding_length(model.d_model)
    writer.add_feed_forward_length(neurons)
    writer.add_head_count(attention.heads)
    writer.add_head_count_kv(attention.kv_heads)
    writer.add_key_length(attention.head_dim)
    writer.add_value_length(attention.head_dim)
    if norm.kind == "rms":
        writer.add_layer_norm_rms_eps(norm.epsilon)
    else:
        writer.add_layer_norm_eps(norm.epsilon)
    writer.add_vocab_size(model.vocabulary)
    _describe_positions(writer, model.family, attention)
    _describe_tokenizer(writer, tokenizer, model)


def _describe_positions(writer: GGUFWriter, family: str, attention: Attention) -> None:
    rope = attention.rope
    if rope is None or not isinstance(rope.scaling, Llama3Scaling | YarnScaling | None):
        raise UnsupportedModel("only plain rotary positions, Llama 3's and YaRN's can be written as GGUF")
    if isinstance(rope.scaling, YarnScaling):
        _describe_yarn(writer, family, rope.scaling)
    writer.add_rope_freq_base(rope.base)
    writer.add_rope_dimension_count(attention.head_dim)


def _describe_yarn(writer: GGUFWriter, family: str, scaling: YarnScaling) -> None:
    """A file says factor and original context; the rest is what readers take for granted of the family."""
    usual = replace(
        scaling,
        fast=32.0,
        slow=1.0,
        truncate=family != "gpt_oss",
        magnitude=0.1 * math.log(scaling.factor) + 1,
    )
    if scaling != usual:
        raise UnsupportedModel(f"YaRN's positions with {scaling} cannot be written as GGUF for {family}")
    writer.add_rope_scaling_type(RopeScalingType.YARN)
    writer.add_rope_scaling_factor(scaling.factor)
    writer.add_rope_scaling_orig_ctx_len(scaling.original)


def _describe_tokenizer(writer: GGUFWriter, path: Path, model: Architecture) -> None:
    """A byte-level BPE that splits as GPT-2 does; ids that it does not have are tokens never used."""
    if not path.is_file():
        writer.add_tokenizer_model("no_vocab")
        return
    described = json.loads(path.read_text(encoding="utf-8"))
    bpe, added = described["model"], described.get("added_tokens", [])
    if bpe["type"] != "BPE" or (described["pre_tokenizer"] or {}).get("type") != "ByteLevel":
        raise UnsupportedModel(f"{path} is not a byte-level BPE that splits as GPT-2 does")
    tokens = [f"[PAD{index}]" for index in range(model.vocabulary)]
    kinds = [TokenType.UNUSED] * model.vocabulary
    for text, index in bpe["vocab"].items():
        tokens[index], kinds[index] = text, TokenType.NORMAL
    for one in added:
        tokens[one["id"]] = one["content"]
        kinds[one["id"]] = TokenType.CONTROL if one["special"] else TokenType.USER_DEFINED
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges([one if isinstance(one, str) else " ".join(one) for one in bpe["merges"]])
    if model.bos_token is not None:
        writer.add_bos_token_id(model.bos_token)
    if model.eos_tokens:
        writer.add_eos_token_id(model.eos_tokens[0])
    writer.add_add_bos_token(_begins(described, model))


def _begins(tokenizer: dict[str, Any], model: Architecture) -> bool:
    """Whether a `tokenizer.json` puts the model's first token before every text."""
    template = (tokenizer.get("post_processor") or {}).get("single", [])
    first = template[0].get("SpecialToken", {}).get("id") if template else None
    named = {one["content"]: one["id"] for one in tokenizer.get("added_tokens", [])}
    return first is not None and named.get(first) == model.bos_token
