"""A synthetic model without experts as something that is converted: its tensors are drawn when they are read.

They are those of the checkpoint that `checkpoint.py` writes of the same request, which need not exist: a
conversion reads a layer's FFN, then the next one's, and all attention behind that. What a layer needs of the
ones before, the calibration sequence's stream, and its vectors are kept in a scratch directory: a second pass
draws attention alone, and an interrupted conversion does not begin anew. In memory are half a layer or the
embedding.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from storage import architecture as canonical
from storage import tokenizer
from storage.checkpoint import HEAD_SOURCE
from storage.codecs import CODECS, Carrier
from storage.convert.recipe import ATTENTION
from storage.errors import CheckpointError
from storage.families.family import Family, Resident, Source
from storage.files import write_whole
from storage.origin import Entry
from workers.lab.synthesis import block
from workers.lab.synthesis.checkpoint import Request, named, plan, recipe_of
from workers.lab.synthesis.embeddings import first_names, first_tensor
from workers.lab.synthesis.generate import Half, make_attention, make_ffn
from workers.lab.synthesis.recipe import SynthesisRecipe, calibration_tokens

STREAM = "stream"  # the calibration sequence's, behind a layer: float32 [tokens, d_model]


@dataclass(slots=True)
class DrawnCheckpoint:
    """An `Origin`. Reading it raises OSError where the scratch directory cannot be written."""

    config: dict[str, Any]
    recipe: SynthesisRecipe
    residents: tuple[Resident, ...]
    family: Family
    scratch: Path
    tokenizer: Path | None
    entries: dict[str, Entry]
    _where: Mapping[str, str]  # of a tensor of the checkpoint: the canonical name of what it is a part of
    _last: tuple[str, dict[str, Tensor]] = field(default=("", {}), repr=False)  # what was drawn, and as what

    @classmethod
    def of(cls, request: Request, out: Path) -> DrawnCheckpoint:
        """None of its tensors drawn yet; the scratch directory lies beside `out`.

        Raises UsageError for a request that cannot be.
        """
        config, model, family = plan(request)
        text = json.dumps(config, sort_keys=True)
        config = json.loads(text)  # as a checkpoint's, and as a journal has it: lists, no tuples
        described = xxhash.xxh3_64_hexdigest(text.encode())
        scratch = Path(os.path.abspath(out)).with_name(f".{out.name}.{described}")
        residents = family.resident(config, model)
        recipe = recipe_of(request, model, residents)
        path, prefix = Path(str(config["_name_or_path"])), family.prefixes[0]
        entries: dict[str, Entry] = {}
        where: dict[str, str] = {}

        def add(source: Source, canonical_name: str) -> None:
            name = source.name if source.name == HEAD_SOURCE else prefix + source.name
            entries[name] = Entry(path, source.whole, request.shape.dtype, 0)
            where[name] = canonical_name

        for resident in residents:
            for source in resident.sources:
                add(source, resident.name)
        for layer in range(len(model.layers)):
            for role, source in family.ffn(model, layer).items():
                add(source, canonical.layer(layer, f"{role}.weight"))
        return cls(config, recipe, residents, family, scratch, request.tokenizer, entries, where)

    @property
    def path(self) -> Path:
        return Path(str(self.config["_name_or_path"]))

    def entry(self, name: str, shape: tuple[int, ...] | None = None) -> Entry:
        entry = self.entries.get(name)
        if entry is None or (shape is not None and entry.shape != shape):
            raise CheckpointError(f"{self.path} has no tensor {name} of the shape {shape}")
        return entry

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Carrier:
        lines = slice(start, stop)
        return _carried(self._tensor(name)[lines], self.entries[name].dtype)

    def chunks(self, name: str, size: int = 64 << 20) -> Iterator[Carrier]:
        flat, dtype = self._tensor(name).reshape(-1), self.entries[name].dtype
        step = size // CODECS[dtype].bytes
        yield from (_carried(flat[start : start + step], dtype) for start in range(0, flat.numel(), step))

    def release(self) -> None:
        """What was drawn last stays: the next tensor is likely to be of the same half of a layer."""

    def generation(self) -> dict[str, Any]:
        return {}

    def texts(self) -> dict[str, bytes]:
        return {} if self.tokenizer is None else tokenizer.texts(self.tokenizer)

    def identity(self) -> dict[str, Any]:
        return {"drawn": self.config}

    def _tensor(self, name: str) -> Tensor:
        """One of the checkpoint's."""
        where = self._where[name]
        if not where.startswith("layers."):
            return self._drawn(where, lambda: {where: first_tensor(self.recipe, where)})[name]
        layer = int(where.split(".")[1])
        if where.endswith(ATTENTION):
            return self._drawn(f"{layer} attention", lambda: self._attention(layer))[name]
        if len(self.entries[name].shape) == 1:
            return self._vectors(layer)[name]
        return self._drawn(f"{layer} ffn", lambda: self._ffn(layer))[name]

    def _drawn(self, what: str, draw: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """By the checkpoint's names."""
        if self._last[0] != what:
            self._last = ("", {})  # before the next is drawn
            self._last = (what, self._named(draw()))
        return self._last[1]

    def _named(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Canonical tensors under the checkpoint's names."""
        model, prefix = self.recipe.model, self.family.prefixes[0]
        found = named(model, prefix, self.residents, tensors)
        for layer in {int(name.split(".")[1]) for name in tensors if name.startswith("layers.")}:
            for role, source in self.family.ffn(model, layer).items():
                where = canonical.layer(layer, f"{role}.weight")
                if where in tensors:
                    found[prefix + source.name] = tensors[where]
        return found

    def _attention(self, layer: int) -> dict[str, Tensor]:
        return _of_layer(layer, make_attention(self.recipe, layer, self._stream(layer)).tensors)

    def _ffn(self, layer: int) -> dict[str, Tensor]:
        """Draws the layer, and keeps what others need of it."""
        x = self._stream(layer)
        attention = make_attention(self.recipe, layer, x)
        attention = Half(_vectors(attention.tensors), attention.x)  # its matrices are drawn again later
        ffn = make_ffn(self.recipe, layer, x, attention)
        vectors = _of_layer(layer, attention.tensors | _vectors(ffn.tensors))
        self._keep(layer, {**vectors, STREAM: ffn.x})
        return _of_layer(layer, ffn.tensors)

    def _stream(self, layer: int) -> Tensor:
        """Before a layer. Layers that are not kept are drawn."""
        if layer == 0:
            names = {canonical.EMBED, canonical.POSITIONS}.intersection(first_names(self.recipe))
            tensors = {name: first_tensor(self.recipe, name) for name in names}
            return block.embedded(self.recipe.model, tensors, calibration_tokens(self.recipe))
        return self._kept(layer - 1)[STREAM]

    def _vectors(self, layer: int) -> dict[str, Tensor]:
        return self._named({name: one for name, one in self._kept(layer).items() if name != STREAM})

    def _kept(self, layer: int) -> dict[str, Tensor]:
        missing = [one for one in range(layer + 1) if not self._file(one).is_file()]
        for one in missing:
            self._ffn(one)
        with safe_open(str(self._file(layer)), framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118

    def _keep(self, layer: int, tensors: dict[str, Tensor]) -> None:
        self.scratch.mkdir(parents=True, exist_ok=True)
        write_whole(self._file(layer), save(tensors))

    def _file(self, layer: int) -> Path:
        return self.scratch / f"layer-{layer}.safetensors"


def _vectors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if tensor.ndim == 1}


def _of_layer(layer: int, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {canonical.layer(layer, part): tensor for part, tensor in parts.items()}


def _carried(tensor: Tensor, dtype: str) -> Carrier:
    tensor = tensor.contiguous()
    found: Carrier = (tensor if dtype == "float32" else tensor.view(torch.uint16)).numpy()
    assert found.dtype == np.dtype(CODECS[dtype].carrier)
    return found
