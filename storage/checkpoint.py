"""Reading a Hugging Face checkpoint directory, one tensor at a time.

Safetensors are read with plain positioned reads rather than a mapping, so that memory is what was asked for
and no more. `pytorch_model*.bin` goes through `torch.load(weights_only=True)`, never plain pickle: mapped,
but for files of torch before 1.6, of which a whole shard is in memory. Every array is of the carrier type
(`storage.codecs`).

Tensors may be float32, float16 or bfloat16; the tensors decide it, not `config.json`. Each keeps its dtype in
the store: converting silently would change results.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from storage import tokenizer
from storage.codecs import CODECS, FLOATS, Carrier
from storage.errors import CheckpointError, UnsupportedModel
from storage.header import BYTES, BadHeader, Header
from storage.json_object import LFS_POINTER, read_json, refuse_pointer, unreadable
from storage.origin import Entry, samples
from storage.tokenizer import GENERATION_CONFIG

CONFIG = "config.json"
WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


INDEX = ".index.json"
HEAD_SOURCE = "lm_head.weight"  # never prefixed, in any family


@dataclass(slots=True)
class Checkpoint:
    """An opened checkpoint: its `config.json` and the directory of its tensors."""

    path: Path
    config: dict[str, Any]
    shards: tuple[Path, ...]
    entries: dict[str, Entry]
    _torch_shard: tuple[Path, dict[str, Any]] | None = field(default=None, repr=False)

    @classmethod
    def open(cls, path: Path) -> Checkpoint:
        """Read `config.json` and every shard's directory, no weights.

        Raises CheckpointError naming the file for whatever is missing, truncated or unreadable.
        """
        if not path.is_dir():
            raise CheckpointError(f"the checkpoint directory {path} does not exist")
        config = read_json(path / CONFIG)
        shards, named = _shards(path)
        entries: dict[str, Entry] = {}
        for shard in shards:
            entries.update(_directory(shard))
        for name, shard in named.items():
            if name == HEAD_SOURCE and name not in entries:
                continue  # a tied one, which is not saved; whether it may be missing, the family knows
            if name not in entries or entries[name].shard != shard:
                raise CheckpointError(
                    f"{shard} lacks the tensor {name} that the checkpoint's index places there"
                )
        return cls(path, config, shards, entries)

    def entry(self, name: str, shape: tuple[int, ...] | None = None) -> Entry:
        """Raises CheckpointError for a missing tensor or another shape, UnsupportedModel for its dtype."""
        entry = self.entries.get(name)
        if entry is None:
            raise CheckpointError(f"the checkpoint {self.path} lacks the tensor {name}")
        if shape is not None and entry.shape != shape:
            raise CheckpointError(
                f"{entry.shard}: {name} has the shape {list(entry.shape)} where config.json asks for "
                f"{list(shape)}"
            )
        if entry.dtype not in FLOATS:
            raise UnsupportedModel(
                f"{entry.shard}: {name} has the dtype {entry.dtype}; supported are {', '.join(FLOATS)}"
            )
        return entry

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Carrier:
        """The tensor, or its lines from `start` up to `stop`."""
        entry = self.entry(name)
        if stop is None:
            elements = self._elements(name, entry, 0, math.prod(entry.shape))
            return elements.reshape(entry.shape)
        width = entry.shape[1:][-1:]
        each = math.prod(width)
        return self._elements(name, entry, start * each, (stop - start) * each).reshape(-1, *width)

    def raw(self, name: str, start: int, stop: int) -> npt.NDArray[np.uint8]:
        """Lines [start, stop) of a tensor of bytes, as they lie. Raises CheckpointError, UnsupportedModel."""
        entry = self.entries[name]
        if entry.dtype != BYTES or entry.shard.suffix == ".bin":
            raise UnsupportedModel(f"{entry.shard}: {name} has the dtype {entry.dtype}; supported is {BYTES}")
        each = math.prod(entry.shape[1:])
        data = _from_file(name, entry, np.uint8, start * each, (stop - start) * each)
        return data.reshape(stop - start, *entry.shape[1:])

    def chunks(self, name: str, size: int = 64 << 20) -> Iterator[Carrier]:
        """The tensor's elements, flat, in chunks of at most `size` bytes."""
        entry = self.entry(name)
        total, step = math.prod(entry.shape), size // CODECS[entry.dtype].bytes
        for start in range(0, total, step):
            yield self._elements(name, entry, start, min(step, total - start))

    def release(self) -> None:
        """Drop the mapping of a `.bin` shard; its pages otherwise stay in this process's memory."""
        self._torch_shard = None

    def generation(self) -> dict[str, Any]:
        path = self.path / GENERATION_CONFIG
        return read_json(path) if path.is_file() else {}

    def texts(self) -> dict[str, bytes]:
        return tokenizer.texts(self.path)

    def identity(self) -> dict[str, Any]:
        """The config's hash and, of each shard, its size and the hash of samples spread over it."""
        return {
            "config": xxhash.xxh3_128_hexdigest(json.dumps(self.config, sort_keys=True).encode()),
            "shards": {shard.name: samples(shard) for shard in self.shards},
        }

    def _elements(self, name: str, entry: Entry, start: int, count: int) -> Carrier:
        carrier = CODECS[entry.dtype].carrier
        if entry.shard.suffix == ".bin":
            flat: Carrier = _as_carrier(self._torch(entry.shard)[name]).reshape(-1)
            return flat[start : start + count]
        return _from_file(name, entry, carrier, CODECS[entry.dtype].size(start), count)

    def _torch(self, shard: Path) -> dict[str, Any]:
        if self._torch_shard is None or self._torch_shard[0] != shard:
            self._torch_shard = (shard, _load_bin(shard))
        return self._torch_shard[1]


def _from_file(name: str, entry: Entry, carrier: type[np.generic], start: int, count: int) -> Carrier:
    """So many elements of a tensor, from its byte `start` on."""
    try:
        data = np.fromfile(entry.shard, carrier, count=count, offset=entry.offset + start)
    except OSError as error:
        unreadable(entry.shard, error)
    if data.size != count:
        raise CheckpointError(f"{entry.shard} is truncated: {name} ends beyond the end of the file")
    return data


def weight_files(path: Path) -> tuple[Path, ...]:
    """The files that hold the weights of a checkpoint's directory. Raises CheckpointError."""
    return _shards(path)[0]


def _shards(path: Path) -> tuple[tuple[Path, ...], dict[str, Path]]:
    """The weight files, and the shard of each tensor where an index says so."""
    for name in WEIGHTS:
        if not (path / name).is_file():
            continue
        if not name.endswith(INDEX):
            return (path / name,), {}
        named = {tensor: path / file for tensor, file in _weight_map(path / name).items()}
        shards = tuple(sorted(set(named.values())))
        for shard in shards:
            if not shard.is_file():
                raise CheckpointError(f"the checkpoint's shard {shard} is missing")
        return shards, named
    raise CheckpointError(f"{path} is not a checkpoint: it has none of {', '.join(WEIGHTS)}")


def listed_shards(index: Path) -> tuple[str, ...]:
    """The names of the files that an index lists. Raises CheckpointError."""
    return tuple(sorted(set(_weight_map(index).values())))


def _weight_map(index: Path) -> dict[str, str]:
    found = read_json(index).get("weight_map")
    if not isinstance(found, dict) or not all(
        isinstance(file, str) and Path(file).name == file for file in found.values()
    ):
        raise CheckpointError(f"{index} cannot be read: it has no valid weight_map")
    return found


def _directory(shard: Path) -> dict[str, Entry]:
    """Name, shape, dtype and place of the tensors of one shard."""
    with shard.open("rb") as file:
        refuse_pointer(shard, file.read(len(LFS_POINTER)))
    if shard.suffix == ".bin":
        return {
            name: Entry(shard, tuple(value.shape), str(value.dtype).removeprefix("torch."), 0)
            for name, value in _load_bin(shard).items()
        }
    return _safetensors_directory(shard)


def _safetensors_directory(shard: Path) -> dict[str, Entry]:
    try:
        places = Header.read(shard).places
    except BadHeader as error:
        raise CheckpointError(f"{shard} {error}") from error
    return {name: Entry(shard, place.shape, place.dtype, place.offset) for name, place in places.items()}


def _load_bin(shard: Path) -> dict[str, Any]:
    """The tensors of a `.bin` shard. Raises CheckpointError for anything torch refuses."""
    import pickle
    import warnings
    import zipfile

    import torch

    try:
        mapped = zipfile.is_zipfile(shard)  # since torch 1.6
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of an unusual pickle, which is then refused or read
            state = torch.load(shard, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{shard} cannot be read: it is damaged, or holds objects other than tensors, which could run "
            "any code when they are read; save the tensors alone, best as safetensors"
        ) from error
    except (RuntimeError, OSError, ValueError, EOFError, KeyError, AttributeError, TypeError) as error:
        unreadable(shard, error)
    if not isinstance(state, dict):
        raise CheckpointError(f"{shard} cannot be read: it is not a dictionary of tensors")
    return {str(name): value for name, value in state.items() if isinstance(value, torch.Tensor)}


def _as_carrier(tensor: Any) -> Carrier:
    """A torch tensor as a numpy array of the carrier type, without a copy where it is contiguous."""
    import torch

    tensor = tensor.detach().contiguous()
    array: Carrier = tensor.numpy() if tensor.dtype == torch.float32 else tensor.view(torch.uint16).numpy()
    return array
