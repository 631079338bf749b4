"""Writing a synthetic checkpoint: `config.json`, a safetensors shard per layer, index, tokenizer.

At most one layer, or one embedding, is in memory. The directory appears under its name when it is
whole; an interrupted one is removed.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from pipeline.models.published import Shape
from storage import architecture as canonical
from storage import tokenizer as tokenizers
from storage.architecture import Architecture
from storage.checkpoint import HEAD_SOURCE
from storage.codecs import CODECS
from storage.errors import CheckpointError, DiskFull, UsageError
from storage.families.family import Family, Resident, Source
from storage.families.registry import family_of
from storage.files import publish
from workers.lab.synthesis import block
from workers.lab.synthesis.embeddings import first_names, first_tensor
from workers.lab.synthesis.generate import make_attention, make_ffn
from workers.lab.synthesis.planting import Planting
from workers.lab.synthesis.recipe import SynthesisRecipe, calibration_tokens
from workers.lab.synthesis.space import check_space

MARK = "synthetic"  # key of config.json that says how the checkpoint was made
# Of each kind of FFN, by the name that `config.json` has for it.
ACTIVATIONS = {"plain": ("relu", "gelu"), "gated": ("relu", "silu")}
ACTIVATION_KEYS = {"opt": "activation_function", "falcon": "activation"}  # others: hidden_act

Progress = Callable[[int, int], None]  # (bytes written, bytes in all)


@dataclass(frozen=True, slots=True)
class Request:
    """What is to be synthesised; `layers` 0 means all of the shape's."""

    shape: Shape
    layers: int = 0
    seed: int = 0
    rate: float = 1.0
    activation: str = ""  # the shape's own, or another
    tokenizer: Path | None = None


def synthesize(request: Request, out: Path, progress: Progress | None = None) -> dict[str, Any]:
    """Write the checkpoint to `out`, which must not exist or be empty; returns its config.

    Raises UsageError for a request that cannot be, CheckpointError for a tokenizer that is not there,
    DiskFull where the disk is, or will be, too full.
    """
    config, model, family = plan(request)
    out = Path(os.path.abspath(out))
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{out} exists: choose another directory")
    total = tensor_bytes(family, config, model, request.shape.dtype)
    check_space(total, out, "the checkpoint")
    partial = out.with_name(f".{out.name}.{os.getpid()}")
    partial.mkdir(parents=True)
    try:
        if request.tokenizer is not None and not tokenizers.copy(request.tokenizer, partial):
            raise CheckpointError(f"{request.tokenizer} has no tokenizer.json, nor vocab.json and merges.txt")
        _write(request, config, model, family, partial, total, progress or (lambda done, total: None))
        publish(partial, out)
    except Exception as error:
        if _is_full(error):
            raise DiskFull(f"no space left for {out}; what was written has been removed") from error
        raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return config


def plan(request: Request) -> tuple[dict[str, Any], Architecture, Family]:
    """The checkpoint's config, and what it means. Raises UsageError."""
    config = dict(request.shape.config)
    whole = int(config["num_hidden_layers"])
    if not 0 <= request.layers <= whole:
        raise UsageError(
            f"{request.shape.name} has {whole} layers: choose 1 to {whole}, not {request.layers}"
        )
    config["num_hidden_layers"] = request.layers or whole
    family = family_of(config)
    model = family.architecture(config)
    if request.activation:
        known = ACTIVATIONS[model.layers[0].ffn.kind]
        if request.activation not in known:
            raise UsageError(
                f"the activation of {request.shape.name} must be {' or '.join(known)}, "
                f"not {request.activation!r}"
            )
        config[ACTIVATION_KEYS.get(family.name, "hidden_act")] = request.activation
        model = family.architecture(config)
    planting = Planting.at_rate(request.rate, model)
    config["_name_or_path"] = f"synthetic-{request.shape.name}"
    config[MARK] = {"shape": request.shape.name, "seed": request.seed, **asdict(planting)}
    return config, model, family


def tensor_bytes(family: Family, config: Mapping[str, Any], model: Architecture, dtype: str) -> int:
    """Bytes of all the checkpoint's tensors."""
    elements = sum(item.elements for item in family.resident(config, model))
    rows = sum(layer.ffn.neurons * len(family.ffn(model, index)) for index, layer in enumerate(model.layers))
    return CODECS[dtype].size(elements + rows * model.d_model)


def recipe_of(request: Request, model: Architecture, residents: tuple[Resident, ...]) -> SynthesisRecipe:
    """What a planned request's tensors are drawn by."""
    first_layer = canonical.layer(0, "")
    return SynthesisRecipe(
        model=model,
        planting=Planting.at_rate(request.rate, model),
        seed=request.seed,
        dtype=getattr(torch, request.shape.dtype),
        parts=frozenset(
            item.name.removeprefix(first_layer) for item in residents if item.name.startswith(first_layer)
        ),
    )


def _write(
    request: Request,
    config: dict[str, Any],
    model: Architecture,
    family: Family,
    directory: Path,
    total: int,
    progress: Progress,
) -> None:
    residents = family.resident(config, model)
    recipe = recipe_of(request, model, residents)
    described = directory / "config.json"
    _write_json(described, config)
    done = 0
    index: dict[str, str] = {}
    for number, tensors in enumerate(_shards(recipe, residents, family), start=1):
        name = f"model-{number:05d}-of-{len(model.layers) + 1:05d}.safetensors"
        save_file(tensors, str(directory / name), metadata={"format": "pt", MARK: request.shape.name})
        shutil.copymode(described, directory / name)  # the library's files are for their owner alone
        index |= dict.fromkeys(tensors, name)
        done += sum(tensor.nbytes for tensor in tensors.values())
        progress(done, total)
    _write_json(
        directory / "model.safetensors.index.json", {"metadata": {"total_size": done}, "weight_map": index}
    )


def _shards(
    recipe: SynthesisRecipe, residents: tuple[Resident, ...], family: Family
) -> Iterator[dict[str, Tensor]]:
    """Tensors by checkpoint name: what belongs to no layer first, then layer by layer."""
    model, prefix = recipe.model, family.prefixes[0]
    tensors = {name: first_tensor(recipe, name) for name in first_names(recipe)}
    x = block.embedded(model, tensors, calibration_tokens(recipe))
    yield named(model, prefix, residents, tensors)
    del tensors
    for layer in range(len(model.layers)):
        attention = make_attention(recipe, layer, x)
        ffn = make_ffn(recipe, layer, x, attention)
        parts, x = attention.tensors | ffn.tensors, ffn.x
        sources = family.ffn(model, layer)
        shard = {prefix + source.name: parts.pop(f"{role}.weight") for role, source in sources.items()}
        shard |= named(
            model, prefix, residents, {canonical.layer(layer, part): value for part, value in parts.items()}
        )
        yield {name: tensor.contiguous() for name, tensor in shard.items()}


def named(
    model: Architecture, prefix: str, residents: tuple[Resident, ...], tensors: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Canonical tensors under the names and in the row order that the family's checkpoints have."""
    found = {}
    for item in residents:
        if item.name in tensors:
            for source, value in _sources(model, item, tensors[item.name]):
                full = source.name if source.name == HEAD_SOURCE else prefix + source.name
                found[full] = value.contiguous()
    return found


def _sources(model: Architecture, item: Resident, tensor: Tensor) -> Iterator[tuple[Source, Tensor]]:
    """Undo `item.build`: the sources whose building gives `tensor`."""
    if item.build is None or item.build is np.concatenate:
        parts = torch.split(tensor, [source.shape[0] for source in item.sources])
        yield from zip(item.sources, parts, strict=True)
        return
    # Falcon's fused rows: find where each row went by building from row numbers.
    (source,) = item.sources
    rows = np.arange(source.shape[0])
    inverse = np.argsort(item.build([rows.reshape(-1, *[1] * (len(source.shape) - 1))]).reshape(-1))
    yield source, tensor[torch.from_numpy(inverse)]


def _write_json(path: Path, data: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def _is_full(error: Exception) -> bool:
    """Whether the disk ran full; safetensors says it in words."""
    if isinstance(error, OSError) and error.errno in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}:
        return True
    return "os error 28" in str(error) or "No space left" in str(error)
