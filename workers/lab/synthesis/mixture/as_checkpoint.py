"""A synthetic mixture as a checkpoint: in float16 what its store has in few bits, and every value the same.

Experts are as the family publishes them: each matrix a tensor, or gpt-oss's stacks in MXFP4. Norms, biases
and routers stay float32. At most SHARD bytes and one tensor, or one layer's stacks, are in memory.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save_file

from storage.codecs import CODECS, FLOAT16, FLOAT32, FLOATS, MXFP4
from storage.errors import UnsupportedModel, UsageError
from storage.files import publish
from storage.microscaled import Microscaled
from workers.lab.synthesis.mixture.origin import SyntheticMixture
from workers.lab.synthesis.space import check_space

SHARD = 1 << 30  # bytes after which another file begins
_EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(\w+)_proj\.weight")
_EXPERT_BIAS = re.compile(r"(.*\.experts)\.(\w+)_proj\.bias")

Array = npt.NDArray[Any]
Progress = Callable[[int, int], None]


def write(origin: SyntheticMixture, out: Path, progress: Progress) -> None:
    """Write the checkpoint `out`, whole or not at all; `progress` hears bytes done, and in all.

    Raises UsageError for an `out` that is there, UnsupportedModel for values that float16 does not hold, and
    DiskFull before writing more than fits.
    """
    out = Path(os.path.abspath(out))
    if out.exists():
        raise UsageError(f"{out} exists: choose another directory")
    total = sum(_size(origin, name) for name in origin.entries)
    check_space(total, out, "the checkpoint")
    partial = out.with_name(f".{out.name}.{os.getpid()}")
    partial.mkdir(parents=True)
    try:
        (partial / "config.json").write_text(json.dumps(_config(origin), indent=2) + "\n", encoding="utf-8")
        for name, text in origin.texts().items():
            (partial / name).write_bytes(text)
        placed = _write_shards(origin, partial, lambda done: progress(done, total))
        index = {"metadata": {"total_size": total}, "weight_map": placed}
        (partial / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
        publish(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _laced(origin: SyntheticMixture) -> bool:
    """Whether the family publishes a layer's experts in stacks, gate and up rows in turn."""
    return origin.tensors.experts == MXFP4.name


def _config(origin: SyntheticMixture) -> dict[str, Any]:
    config = {**origin.config, "torch_dtype": "float16"}
    if _laced(origin):
        config["quantization_config"] = {
            "quant_method": "mxfp4",
            "modules_to_not_convert": ["model.embed_tokens", "model.layers.*.self_attn", "lm_head"],
        }
    return config


def _size(origin: SyntheticMixture, name: str) -> int:
    entry = origin.entries[name]
    codec = CODECS[entry.dtype]
    if codec.grouped is not None and entry.dtype != MXFP4.name:
        codec = FLOAT16
    return codec.size(math.prod(entry.shape))


def _write_shards(origin: SyntheticMixture, directory: Path, wrote: Callable[[int], None]) -> dict[str, str]:
    """Each tensor's file, by its name; files are called as in a checkpoint of unknown length."""
    placed: dict[str, str] = {}
    held: dict[str, Array] = {}
    done = 0

    def flush() -> None:
        nonlocal done
        name = f"model-{len(set(placed.values())) + 1:05d}.safetensors"
        save_file(held, str(directory / name), metadata={"format": "pt"})
        shutil.copymode(
            directory / "config.json", directory / name
        )  # the library's are for their owner alone
        placed.update(dict.fromkeys(held, name))
        done += sum(tensor.nbytes for tensor in held.values())
        held.clear()
        wrote(done)

    for name, values in _stacked(origin) if _laced(origin) else _alone(origin, origin.entries):
        held[name] = values
        if sum(tensor.nbytes for tensor in held.values()) >= SHARD:
            flush()
    if held:
        flush()
    return placed


def _alone(origin: SyntheticMixture, names: Any) -> Iterator[tuple[str, Array]]:
    """Tensors as they are named, in float16 or, of what the store has in floats, as they are."""
    for name in names:
        dtype = origin.entries[name].dtype
        values = CODECS[dtype].widen(origin.read(name))
        if dtype in FLOATS:
            assert dtype == FLOAT32.name
            yield name, np.ascontiguousarray(values)
            continue
        halves = values.astype(np.float16)
        if not np.array_equal(halves, values):
            raise UnsupportedModel(f"float16 does not hold the values of {name}")
        yield name, halves


def _stacked(origin: SyntheticMixture) -> Iterator[tuple[str, Array]]:
    """gpt-oss's: `gate_up_proj` and `down_proj` of a layer, their blocks and scales, and their biases."""
    stacks: dict[str, dict[str, dict[int, str]]] = {}
    biases: dict[str, dict[str, str]] = {}
    others = []
    for name in origin.entries:
        if expert := _EXPERT.fullmatch(name):
            stacks.setdefault(expert[1], {}).setdefault(expert[3], {})[int(expert[2])] = name
        elif bias := _EXPERT_BIAS.fullmatch(name):
            biases.setdefault(bias[1], {})[bias[2]] = name
        else:
            others.append(name)
    yield from _alone(origin, others)
    for stem, roles in stacks.items():
        packed = {
            role: [_apart(origin.read(named[number])) for number in range(len(named))]
            for role, named in roles.items()
        }
        for place, kind in enumerate(("blocks", "scales")):
            gate, up, down = (
                np.stack([one[place] for one in packed[role]]) for role in ("gate", "up", "down")
            )
            yield f"{stem}.gate_up_proj_{kind}", _in_turn(gate, up)
            yield f"{stem}.down_proj_{kind}", down
        of = {role: origin.read(name) for role, name in biases[stem].items()}
        yield f"{stem}.gate_up_proj_bias", _in_turn(of["gate"], of["up"])
        yield f"{stem}.down_proj_bias", of["down"]


def _in_turn(gate: Array, up: Array) -> Array:
    """[experts, 2 rows, ...] of two [experts, rows, ...]."""
    return np.stack([gate, up], axis=2).reshape(len(gate), -1, *gate.shape[2:])


def _apart(rows: Array) -> tuple[Array, Array]:
    """Blocks [rows, groups, 16], each byte two neighbouring values, and scales [rows, groups]."""
    grouped = MXFP4.grouped
    assert isinstance(grouped, Microscaled)
    codes, scales = grouped.split(rows)
    values = np.concatenate([codes & 15, codes >> 4], axis=-1)
    return values[..., ::2] | values[..., 1::2] << 4, scales
