"""What a conversion will read and write, checked before anything is written."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from storage import resident
from storage.architecture import Architecture, Ffn, always_floats
from storage.checkpoint import HEAD_SOURCE
from storage.codecs import CODECS, FLOAT16, FLOAT32, FLOATS, Carrier
from storage.convert.recipe import AS_IT_IS, Recipe, chosen, unit_width
from storage.errors import CheckpointError, UnsupportedModel, UsageError, reason
from storage.families.family import Family, Resident, Source
from storage.families.registry import family_of
from storage.layout import Layout, Role, Row, Unit, neuron
from storage.manifest import CHECKSUM_BYTES, FORMAT_VERSION
from storage.origin import Entry, Origin
from storage.resident import Stored

# Of published rows that cannot be kept as they are: of several formats, or to be turned into columns.
_ROUNDED_AGAIN = "q8"


@dataclass(frozen=True, slots=True)
class NeuronOrder:
    """Which neuron lies at each position of `bundles.bin`: int32 `[layers, units]`, and its method."""

    name: str
    neurons: npt.NDArray[np.int32]


def read_order(path: Path) -> NeuronOrder:
    """The order of a `.npy` file, named after it. Raises UsageError."""
    try:
        with path.open("rb") as file:
            neurons = np.load(file, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UsageError(f"{path} is no neuron order: {reason(error)}") from error
    return NeuronOrder(path.stem, np.ascontiguousarray(neurons))


@dataclass(frozen=True, slots=True)
class Conversion:
    """A checked conversion: everything is present in the right shape and dtype."""

    checkpoint: Origin
    family: Family
    prefix: str
    architecture: Architecture
    layout: Layout
    residents: tuple[Stored, ...]
    order: NeuronOrder | None
    parameters: dict[str, Any]

    def full_name(self, source: str) -> str:
        return _full_name(self.prefix, source)

    def expert(self, layer: int, expert: int) -> Mapping[Role, Source]:
        """The sources of one expert's matrices."""
        return published(self.family, self.architecture, layer, expert, self.full_name, self.checkpoint)

    def read(self, source: Source) -> Carrier:
        """A source's values, in their carrier."""
        return resident.read(self.checkpoint, source, self.full_name)

    def dtype(self, source: Source) -> str:
        """The codec that `read` gives."""
        return self.checkpoint.entry(self.full_name(source.name)).dtype

    @property
    def total_bytes(self) -> int:
        checksums = self.layout.total_units * CHECKSUM_BYTES
        return self.layout.total_bytes + checksums + resident.size(self.residents)


def check(
    checkpoint: Origin, alignment: int, order: NeuronOrder | None = None, recipe: Recipe = AS_IT_IS
) -> Conversion:
    """Check names, shapes and dtypes of everything that will be read, without reading it.

    Only a head beside a tied embedding is read, to compare the two.
    """
    if alignment <= 0 or alignment & (alignment - 1):
        raise UsageError(f"the alignment must be a power of two, not {alignment}")
    config = _with_generation(checkpoint)
    family = family_of(config)
    model = family.architecture(config)
    prefix = _prefix(checkpoint, family)
    model = replace(model, tied_head=_tied(checkpoint, prefix + family.embedding, model))
    sources = _Sources(checkpoint, family, prefix, recipe)
    units = _units(sources, family, model, alignment)
    layers = tuple(
        replace(layer, ffn=replace(layer.ffn, units=layer.ffn.neurons // unit.width, width=unit.width))
        for layer, unit in zip(model.layers, units, strict=True)
    )
    model = replace(model, layers=layers)
    layout = Layout.of((layer.ffn.units, unit) for layer, unit in zip(layers, units, strict=True))
    usual = next((row.codec for unit in units for row in unit.rows if row.codec in FLOATS), FLOAT32.name)
    residents = tuple(Stored(one, sources.dtype(one, usual)) for one in family.resident(config, model))
    _check_order(order, layout)
    parameters = {
        "format_version": FORMAT_VERSION,
        "alignment": alignment,
        "order": "id" if order is None else order.name,
        "order_xxh3_128": None if order is None else xxhash.xxh3_128_hexdigest(order.neurons.tobytes()),
        "source": checkpoint.identity(),
    }
    if recipe.ffn is not None:
        parameters["bits"] = recipe.bits
    if recipe.attention is not None:
        parameters["attention"] = recipe.attention
    if "synthetic" in config:  # a synthetic checkpoint's mark: whoever reports on the store shows it
        parameters["synthetic"] = config["synthetic"]
    checkpoint.release()
    return Conversion(checkpoint, family, prefix, model, layout, residents, order, parameters)


def _units(sources: _Sources, family: Family, model: Architecture, alignment: int) -> list[Unit]:
    """One unit of each layer. A layer that has nothing on flash gets a neuron in another layer's codec."""
    found: dict[int, Unit] = {}
    for index, layer in enumerate(model.layers):
        if layer.ffn.router is not None:
            found[index] = sources.expert(model, index, alignment)
        elif layer.ffn.units:
            found[index] = sources.unit(family.ffn(model, index), layer.ffn, alignment)
    codec = next(iter(found.values())).rows[0].codec
    return [
        found.get(index) or neuron(codec, model.d_model, alignment, layer.ffn.kind)
        for index, layer in enumerate(model.layers)
    ]


def _with_generation(checkpoint: Origin) -> dict[str, Any]:
    """The config, with the stop tokens of `generation_config.json` where it has any."""
    config = dict(checkpoint.config)
    eos = checkpoint.generation().get("eos_token_id")
    if eos is not None:
        config["eos_token_id"] = eos
    return config


def _prefix(checkpoint: Origin, family: Family) -> str:
    for prefix in family.prefixes:
        if prefix + family.embedding in checkpoint.entries:
            return prefix
    raise CheckpointError(
        f"the checkpoint {checkpoint.path} lacks the tensor {family.prefixes[0]}{family.embedding}"
    )


def _tied(checkpoint: Origin, embedding: str, model: Architecture) -> bool:
    """Whether the head is the embedding. As transformers 5 does, the tensors decide over the config."""
    shape = (model.vocabulary, model.embed_dim)
    if HEAD_SOURCE not in checkpoint.entries and model.tied_head:
        return True
    head = checkpoint.entry(HEAD_SOURCE, shape)
    if checkpoint.entry(embedding, shape).dtype != head.dtype:
        return False
    pairs = zip(checkpoint.chunks(embedding), checkpoint.chunks(HEAD_SOURCE), strict=True)
    return all(np.array_equal(left, right) for left, right in pairs)


def _check_order(order: NeuronOrder | None, layout: Layout) -> None:
    if order is None:
        return
    neurons, units = order.neurons, layout.units
    if neurons.dtype != np.int32 or neurons.ndim != 2 or order.name == "id":
        raise UsageError("the neuron order must be int32 of shape [layers, units], under a name of its own")
    if neurons.shape[0] != len(units) or any(neurons.shape[1] != count for count in units):
        raise UsageError("the neuron order must be int32 of shape [layers, units], under a name of its own")
    if not (np.sort(neurons, axis=1) == np.arange(neurons.shape[1])).all():
        raise UsageError("the neuron order is not a permutation of the neurons in every layer")


def _full_name(prefix: str, source: str) -> str:
    return source if source == HEAD_SOURCE else prefix + source


def published(
    family: Family,
    model: Architecture,
    layer: int,
    expert: int,
    full_name: Callable[[str], str],
    checkpoint: Origin,
) -> Mapping[Role, Source]:
    """One expert's sources in the form that the checkpoint has; if it has none, in the usual one."""
    assert family.experts is not None, f"{family.name} has no experts"
    forms = family.experts(model, layer, expert)
    for form in forms:
        if all(full_name(source.name) in checkpoint.entries for source in form.values()):
            return form
    return forms[0]


@dataclass(frozen=True, slots=True)
class _Sources:
    """Asks that every source is present and of its shape, and tells its dtype."""

    checkpoint: Origin
    family: Family
    prefix: str
    recipe: Recipe

    def unit(self, sources: Mapping[Role, Source], ffn: Ffn, alignment: int) -> Unit:
        """One unit of this FFN."""
        d_model = sources["up"].shape[1]
        found = {role: self._entry(source).dtype for role, source in sources.items()}
        low = self.recipe.ffn is not None or any(dtype not in FLOATS for dtype in found.values())
        width = unit_width(ffn, low)
        rows = []
        for role, dtype in found.items():
            if role == "down" and width > 1:  # by output, as the source has it
                rows.append(Row(role, chosen(dtype, self.recipe.ffn, width)))
                continue
            if role == "down" and dtype not in FLOATS:
                again = _ROUNDED_AGAIN if CODECS[_ROUNDED_AGAIN].fits(d_model) else FLOAT16.name
                rows.append(Row(role, chosen(again, self.recipe.ffn, d_model)))
                continue
            rows.append(Row(role, chosen(dtype, self.recipe.ffn, d_model)))
        return Unit(tuple(rows), width, d_model, alignment)

    def expert(self, model: Architecture, layer: int, alignment: int) -> Unit:
        """The unit that a layer's experts are. Raises UnsupportedModel for experts that differ in dtype."""
        ffn, found = model.layers[layer].ffn, dict[Role, str]()
        for expert in range(ffn.units):
            sources = published(self.family, model, layer, expert, self._full_name, self.checkpoint)
            for role, source in sources.items():
                entry = self._entry(source)
                if entry.dtype != found.setdefault(role, entry.dtype):
                    raise UnsupportedModel(
                        f"{entry.shard}: {self._full_name(source.name)} is {entry.dtype} where the layer's "
                        f"first expert is {found[role]}; a layer's experts cannot have two dtypes"
                    )
        widths: dict[Role, int] = {"gate": model.d_model, "up": model.d_model, "down": ffn.width}
        rows = (Row(role, chosen(dtype, self.recipe.ffn, widths[role])) for role, dtype in found.items())
        return Unit(tuple(rows), ffn.width, model.d_model, alignment)

    def _full_name(self, source: str) -> str:
        return _full_name(self.prefix, source)

    def dtype(self, resident: Resident, usual: str) -> str:
        """`usual` without sources; float32, which holds them all, for floats of several dtypes."""
        if not resident.sources:
            return usual
        first, *others = (self._entry(source) for source in resident.sources)
        found = first.dtype
        for entry in others:
            if entry.dtype != first.dtype:
                floats = entry.dtype in FLOATS and first.dtype in FLOATS
                found = FLOAT32.name if floats else _ROUNDED_AGAIN
        if len(resident.shape) != 2 or always_floats(resident.name):
            return found
        return chosen(found, self.recipe.matrix(resident.name), resident.shape[1])

    def _entry(self, source: Source) -> Entry:
        return self.checkpoint.entry(_full_name(self.prefix, source.name), source.whole)


def same_parameters(left: dict[str, Any], right: dict[str, Any]) -> bool:
    """Whether two conversions write the same bytes; formats 1 and 2 differ in the manifest alone."""
    return all(left.get(name) == right.get(name) for name in {*left, *right} if name != "format_version")
