"""gpt-oss's checkpoints: all experts of a layer in one tensor, gate and up rows in turn.

Each expert's matrices are given here under the names that other mixtures publish, as are the biases. Two
forms are read, with E experts of I neurons:

- floats: `gate_up_proj` [E, d_model, 2 I] and `down_proj` [E, I, d_model], both the other way round;
- MXFP4: `..._blocks` [E, rows, groups, 16], each byte two neighbouring values, and `..._scales`
  [E, rows, groups].
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from storage.checkpoint import Checkpoint
from storage.codecs import BFLOAT16, FLOATS, MXFP4, Carrier
from storage.errors import CheckpointError, UnsupportedModel
from storage.lowbits import RUN
from storage.microscaled import Microscaled
from storage.origin import Entry, Origin

_TENSOR = re.compile(r"(.*\.experts)\.(gate_up_proj|down_proj)(_bias|_blocks|_scales)?")
_BLOCKS, _SCALES, _BIAS = "_blocks", "_scales", "_bias"


@dataclass(frozen=True, slots=True)
class _Part:
    """A matrix, or a layer's biases, within a checkpoint's tensor."""

    entry: Entry
    source: str  # without `_blocks`
    expert: int = 0
    start: int = 0  # of the rows that it has, every `step`
    step: int = 1


@dataclass(frozen=True, slots=True)
class Unlaced:
    """`storage.origin.Origin` over a checkpoint."""

    checkpoint: Checkpoint
    entries: Mapping[str, Entry]
    _parts: Mapping[str, _Part]

    @property
    def path(self) -> Path:
        return self.checkpoint.path

    @property
    def config(self) -> dict[str, Any]:
        return self.checkpoint.config

    def entry(self, name: str, shape: tuple[int, ...] | None = None) -> Entry:
        part = self._parts.get(name)
        if part is None:
            return self.checkpoint.entry(name, shape)
        if shape is not None and part.entry.shape != shape:
            raise CheckpointError(
                f"{part.entry.shard}: {part.source} has experts of the shape {list(part.entry.shape)} where "
                f"config.json asks for {list(shape)}"
            )
        if part.entry.dtype not in (*FLOATS, MXFP4.name):
            raise UnsupportedModel(
                f"{part.entry.shard}: {part.source} has the dtype {part.entry.dtype}; supported are "
                f"{', '.join(FLOATS)} and {MXFP4.name}"
            )
        return part.entry

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Carrier:
        part = self._parts.get(name)
        if part is None:
            return self.checkpoint.read(name, start, stop)
        self.entry(name)
        return self._whole(part)[start:stop]

    def chunks(self, name: str, size: int = 64 << 20) -> Iterator[Carrier]:
        if name in self._parts:
            yield self.read(name).reshape(-1)
        else:
            yield from self.checkpoint.chunks(name, size)

    def release(self) -> None:
        self.checkpoint.release()

    def generation(self) -> dict[str, Any]:
        return self.checkpoint.generation()

    def texts(self) -> dict[str, bytes]:
        return self.checkpoint.texts()

    def identity(self) -> dict[str, Any]:
        dtypes = sorted({part.entry.dtype for part in self._parts.values()})
        return {**self.checkpoint.identity(), "experts": dtypes}

    def _whole(self, part: _Part) -> Carrier:
        rows = slice(part.start, None, part.step)
        if part.source.endswith(_BIAS):
            return np.ascontiguousarray(self.checkpoint.read(part.source)[:, rows])
        if part.source + _BLOCKS in self.checkpoint.entries:
            blocks, scales = (
                self.checkpoint.raw(part.source + kind, part.expert, part.expert + 1)[0, rows]
                for kind in (_BLOCKS, _SCALES)
            )
            packed = Microscaled().join(_apart(blocks), scales)
            return packed if part.entry.dtype == MXFP4.name else BFLOAT16.narrow(MXFP4.widen(packed))
        lines = self.checkpoint.entries[part.source].shape[1]
        both = self.checkpoint.read(part.source, part.expert * lines, (part.expert + 1) * lines)
        return np.ascontiguousarray(both.T[rows])


def _apart(blocks: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """[..., 16] bytes of two neighbouring values each, with values half a group apart instead."""
    codes = np.stack([blocks & 15, blocks >> 4], axis=-1).reshape(*blocks.shape[:-1], RUN)
    packed: npt.NDArray[np.uint8] = codes[..., : RUN // 2] | codes[..., RUN // 2 :] << 4
    return packed


def opened(checkpoint: Checkpoint, keep: bool) -> Origin:
    """With `keep` MXFP4 stays as it is; without, it becomes bfloat16, which holds all of its values.

    Raises CheckpointError for blocks without their scales, UnsupportedModel for rows that no codec holds.
    """
    entries, parts = dict[str, Entry](), dict[str, _Part]()
    for name, entry in checkpoint.entries.items():
        found = _TENSOR.fullmatch(name)
        if found is None:
            entries[name] = entry
        elif found[3] != _SCALES:
            parts |= _parts(checkpoint, entry, found[1], found[2], found[3] or "", keep)
    entries |= {name: part.entry for name, part in parts.items()}
    return Unlaced(checkpoint, entries, parts)


def _parts(
    checkpoint: Checkpoint, entry: Entry, experts: str, projection: str, kind: str, keep: bool
) -> dict[str, _Part]:
    """What one tensor holds, by the names that it has here."""
    source = f"{experts}.{projection}"
    roles = ("gate_proj", "up_proj") if projection == "gate_up_proj" else ("down_proj",)
    step = len(roles)
    shape = entry.shape
    if kind == _BIAS:
        if len(shape) != 2:
            raise CheckpointError(f"{entry.shard}: {source}{kind} has the shape {list(shape)}")
        own = Entry(entry.shard, (shape[0], shape[1] // step), entry.dtype, 0)
        return {
            f"{experts}.{role}.bias": _Part(own, source + _BIAS, 0, start, step)
            for start, role in enumerate(roles)
        }
    rows, columns, dtype = _matrix(checkpoint, entry, source, kind, keep)
    own = Entry(entry.shard, (rows // step, columns), dtype, 0)
    return {
        f"{experts}.{expert}.{role}.weight": _Part(own, source, expert, start, step)
        for expert in range(shape[0])
        for start, role in enumerate(roles)
    }


def _matrix(checkpoint: Checkpoint, entry: Entry, source: str, kind: str, keep: bool) -> tuple[int, int, str]:
    """Rows, columns and dtype of an expert's matrix, before gate and up are parted."""
    shape = entry.shape
    if not kind:
        if len(shape) != 3:
            raise CheckpointError(f"{entry.shard}: {source} has the shape {list(shape)}")
        return shape[2], shape[1], entry.dtype
    scales = checkpoint.entries.get(source + _SCALES)
    if len(shape) != 4 or shape[3] != RUN // 2 or scales is None or scales.shape != shape[:3]:
        raise CheckpointError(f"{entry.shard}: {source}{kind} and its scales make no MXFP4")
    columns = RUN * shape[2]
    if not keep:
        return shape[1], columns, BFLOAT16.name
    if not MXFP4.fits(columns):
        raise UnsupportedModel(f"{entry.shard}: rows of {columns} values in MXFP4 are not supported")
    return shape[1], columns, MXFP4.name
