"""A mixture's store as a GGUF file of the same weights, for other programs: no code is rounded or changed.

Rows in `q4s` become Q4_0, in `q4` Q4_1, in `q8` Q8_0, and MXFP4 stays what it is: a group's scale and minimum
go before its codes, whose order is the same. Floats of 16 bits become float32, as other programs want norms.
Experts are stacked in the order of their ids. At most one role of one layer's experts is in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter

from storage import architecture as canonical
from storage.architecture import Architecture, Layer
from storage.codecs import CODECS, FLOATS, Carrier, widen
from storage.errors import UnsupportedModel, UsageError
from storage.layout import Role
from storage.lowbits import Grouped
from storage.manifest import BUNDLES, RESIDENT
from storage.store import Store
from storage.tensors import Tensors
from workers.lab.synthesis.as_gguf import TOKENIZER, Tensor, describe, paired, write_file
from workers.lab.synthesis.mixture.draw import Codes

# By family: llama.cpp's name of the architecture, and whether rotary pairs lie side by side in its files.
ARCHITECTURES = {
    "qwen3_moe": ("qwen3moe", False),
    "olmoe": ("olmoe", False),
    "mixtral": ("llama", True),
    "gpt_oss": ("gpt-oss", False),
}
KINDS = {
    "mxfp4": GGMLQuantizationType.MXFP4,
    "q4s": GGMLQuantizationType.Q4_0,
    "q4": GGMLQuantizationType.Q4_1,
    "q8": GGMLQuantizationType.Q8_0,
    **dict.fromkeys(FLOATS, GGMLQuantizationType.F32),
}
PARTS = {
    "norm.weight": "attn_norm.weight",
    "ffn_norm.weight": "ffn_norm.weight",
    "q_norm.weight": "attn_q_norm.weight",
    "k_norm.weight": "attn_k_norm.weight",
    "out.weight": "attn_output.weight",
    "out.bias": "attn_output.bias",
    "sinks": "attn_sinks.weight",
    "router.weight": "ffn_gate_inp.weight",
    "router.bias": "ffn_gate_inp.bias",
}
WINDOWS = ("gpt_oss", "mixtral")  # families whose files may have a window
GATES = (7.0, 1.702)  # of gpt-oss; no file says other ones
_NORM_BEFORE_FFN = {"gpt_oss": "post_attention_norm.weight"}  # of families that call it otherwise
_EXPERT_BIASES = {f"{role}.bias": f"ffn_{role}_exps.bias" for role in ("gate", "up", "down")}
TOP = {
    canonical.EMBED: "token_embd.weight",
    f"{canonical.FINAL_NORM}.weight": "output_norm.weight",
    canonical.HEAD: "output.weight",
}


def kept(name: str, shape: tuple[int, ...], codec: str, read: Callable[[], Carrier]) -> Tensor:
    """A tensor whose rows `read` gives as the store has them: [rows, bytes], or floats."""

    def packed() -> Carrier:
        rows = read()
        return widen(rows, codec) if codec in FLOATS else blocks(rows, codec)

    return Tensor(name, shape, KINDS[codec], packed)


def blocks(rows: Codes, codec: str) -> Codes:
    """Rows [n, bytes] of groups in `codec`, codes first, as rows of blocks, scale and minimum first."""
    grouped = CODECS[codec].grouped
    assert grouped is not None
    count, each = rows.shape[1] // grouped.bytes, grouped.group * grouped.bits // 8
    codes = rows[:, : count * each].reshape(-1, count, each)
    number, size = (grouped.tables, 2) if isinstance(grouped, Grouped) else (1, 1)
    tables = rows[:, count * each :].reshape(-1, number, count, size).swapaxes(1, 2)
    made = np.concatenate([tables.reshape(*codes.shape[:2], -1), codes], axis=2)
    return made.reshape(rows.shape[0], -1)


def write(store: Store, out: Path, progress: Callable[[int, int], None] | None = None) -> None:
    """Write the store to the file `out`; `progress` gets bytes written, of all.

    Raises UsageError for a file that is there, UnsupportedModel for what GGUF has no form for, and DiskFull
    before writing more than fits.
    """
    if out.exists():
        raise UsageError(f"{out} exists: choose another file")
    model = store.architecture
    if model.family not in ARCHITECTURES or not all(layer.ffn.router for layer in model.layers):
        raise UnsupportedModel(
            f"{store.path} is a {model.family} store; only {', '.join(ARCHITECTURES)} can be written as GGUF"
        )
    write_file(
        out,
        ARCHITECTURES[model.family][0],
        lambda writer: _describe(writer, store),
        list(_tensors(store)),
        progress,
    )


def _tensors(store: Store) -> Iterator[Tensor]:
    model, resident = store.architecture, Tensors(store.path / RESIDENT)
    for name in resident.names:
        place = resident.place(name)
        if place.dtype not in KINDS:
            raise UnsupportedModel(f"{store.path} has {name} in {place.dtype}, which GGUF has no form for")
        shape = place.shape
        if place.dtype not in FLOATS:
            codec = CODECS[place.dtype]
            shape = (shape[0], shape[1] // codec.bytes * codec.block)
        if name in TOP:
            yield kept(TOP[name], shape, place.dtype, _whole(resident, name))
            continue
        _, number, part = name.split(".", 2)
        layer, read = model.layers[int(number)], _whole(resident, name)
        if part in ("qkv.weight", "qkv.bias"):
            yield from _projections(model, layer, int(number), resident, name, shape, place.dtype)
            continue
        if part in _EXPERT_BIASES and layer.ffn.router is not None:
            shape = (layer.ffn.units, shape[0] // layer.ffn.units)
            yield kept(f"blk.{number}.{_EXPERT_BIASES[part]}", shape, place.dtype, read)
            continue
        if part not in PARTS:
            raise UnsupportedModel(f"{store.path} has {name}, which cannot be written as GGUF")
        theirs = PARTS[part]
        if part == "ffn_norm.weight":
            theirs = _NORM_BEFORE_FFN.get(model.family, theirs)
        yield kept(f"blk.{number}.{theirs}", shape, place.dtype, read)
    for index, placed in enumerate(store.layout.layers):
        for row in placed.unit.rows:
            if row.codec not in KINDS:
                raise UnsupportedModel(f"{store.path} has experts in {row.codec}, which GGUF has no form for")
            yield kept(
                f"blk.{index}.ffn_{row.role}_exps.weight",
                (placed.units, *placed.unit.shape(row.role)),
                row.codec,
                _experts(store, index, row.role),
            )


def _whole(resident: Tensors, name: str) -> Callable[[], Carrier]:
    return lambda: resident.read(name)


def _projections(
    model: Architecture,
    layer: Layer,
    index: int,
    resident: Tensors,
    name: str,
    shape: tuple[int, ...],
    codec: str,
) -> Iterator[Tensor]:
    """Queries, keys and values apart, or their biases."""
    a, start, kind = layer.attention, 0, name.rpartition(".")[2]
    side_by_side = ARCHITECTURES[model.family][1]
    for one, heads in (("q", a.heads), ("k", a.kv_heads), ("v", a.kv_heads)):
        rows = np.arange(start, start + heads * a.head_dim)
        start += rows.size
        if side_by_side and one != "v":
            rows = paired(rows, heads)

        def read(which: np.ndarray[tuple[int], np.dtype[np.int64]] = rows) -> Carrier:
            found: Carrier = resident.read(name)[which]
            return found

        yield kept(f"blk.{index}.attn_{one}.{kind}", (rows.size, *shape[1:]), codec, read)


def _experts(store: Store, layer: int, role: Role) -> Callable[[], Carrier]:
    def read() -> Carrier:
        part = store.layout.layers[layer]
        (begin, end), (count, _) = part.unit.span(role), part.unit.shape(role)
        positions = store.positions()
        made = np.empty((part.units, end - begin), np.uint8)
        with (store.path / BUNDLES).open("rb") as file:
            for unit in range(part.units):
                position = unit if positions is None else int(positions[layer][unit])
                file.seek(part.offset(position) + begin)
                if file.readinto(made[unit].data) != end - begin:
                    raise OSError(f"{file.name} ends within expert {unit} of layer {layer}")
        return made.reshape(part.units * count, -1).view(part.unit.codec(role).carrier)

    return read


def _describe(writer: GGUFWriter, store: Store) -> None:
    model = store.architecture
    attention, ffn = model.layers[0].attention, model.layers[0].ffn
    assert ffn.router is not None
    if model.family == "gpt_oss" and ffn.numbers != GATES:
        raise UnsupportedModel(f"gates with {ffn.numbers}, limit and alpha, cannot be written as GGUF")
    if attention.window is not None:
        if model.family not in WINDOWS:
            raise UnsupportedModel(f"a window of {model.family} cannot be written as GGUF")
        writer.add_sliding_window(attention.window)
    describe(writer, store.manifest.name, model, ffn.width, store.path / TOKENIZER)
    writer.add_expert_feed_forward_length(ffn.width)
    writer.add_expert_count(ffn.units)
    writer.add_expert_used_count(ffn.router.top_k)
