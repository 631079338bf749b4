"""Writing a synthetic mixture: into a store, or as a checkpoint of the same numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from pipeline.models.published import Shape
from storage import tokenizer as tokenizers
from storage.convert.write import convert_origin
from storage.errors import CheckpointError, UsageError
from storage.families.registry import family_of
from storage.store import Store
from workers.lab.synthesis.mixture import as_checkpoint
from workers.lab.synthesis.mixture.origin import SyntheticMixture
from workers.lab.synthesis.mixture.planting import MixturePlanting
from workers.lab.synthesis.mixture.tensors import EXPERTS, Tensors


@dataclass(frozen=True, slots=True)
class MixtureRequest:
    """What is to be synthesised; `layers` 0 means all of the shape's."""

    shape: Shape
    layers: int = 0
    seed: int = 0
    rate: float = 1.0
    locality: bool = True
    bits: int = 4
    tokenizer: Path | None = None


def create(
    request: MixtureRequest, out: Path, progress: Callable[[str, int, int], None] | None = None
) -> Store:
    """Write the store `out`, or go on writing it; `progress` hears stage, bytes done and bytes in all.

    Raises as `storage.convert.convert`, and UsageError for a request that cannot be.
    """
    _check(request)
    origin = described(request)
    return convert_origin(origin, out, name=str(origin.path), progress=progress)


def create_checkpoint(
    request: MixtureRequest, out: Path, progress: Callable[[int, int], None] | None = None
) -> None:
    """Write the store's numbers as a checkpoint; `progress` hears bytes done and bytes in all.

    Raises UsageError for a request that cannot be, CheckpointError for a tokenizer that is not there,
    DiskFull before writing more than fits.
    """
    _check(request)
    as_checkpoint.write(described(request), out, progress or (lambda done, total: None))


def _check(request: MixtureRequest) -> None:
    if request.bits not in EXPERTS:
        raise UsageError(f"a mixture's bits must be 4 or 8, not {request.bits}")
    if request.tokenizer is not None and tokenizers.TOKENIZER not in tokenizers.texts(request.tokenizer):
        raise CheckpointError(f"{request.tokenizer} has no tokenizer.json, nor vocab.json and merges.txt")


def described(request: MixtureRequest) -> SyntheticMixture:
    """The mixture, none of its tensors drawn yet. Raises UsageError and UnsupportedModel."""
    config, whole = dict(request.shape.config), int(request.shape.config["num_hidden_layers"])
    if not 0 <= request.layers <= whole:
        raise UsageError(
            f"{request.shape.name} has {whole} layers: choose 1 to {whole}, not {request.layers}"
        )
    config["num_hidden_layers"] = request.layers or whole
    planting = MixturePlanting.at_rate(request.rate, request.locality)
    config["_name_or_path"] = f"synthetic-{request.shape.name}"
    config["synthetic"] = {
        "shape": request.shape.name,
        "seed": request.seed,
        "bits": request.bits,
        **asdict(planting),
    }
    family = family_of(config)
    tensors = Tensors(family.architecture(config), planting, request.seed, request.bits)
    return SyntheticMixture.of(config, family, tensors, request.tokenizer)
