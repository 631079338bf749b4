"""What is fixed before a synthetic checkpoint's first layer is made, and where its randomness comes from."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from storage.architecture import NORM_PARTS, Architecture, Layer, NormPlace
from workers.lab.synthesis.block import Tensors
from workers.lab.synthesis.planting import Planting

CALIBRATION_TOKENS = 320


@dataclass(frozen=True, slots=True)
class Constant:
    """What is the same in every token's normed row. Both `[d_model]`."""

    along: Tensor  # its direction: rows orthogonal to it see nothing of it
    dual: Tensor  # a row that sees nothing else; its product with the normed row is 1, about


@dataclass(slots=True)
class SynthesisRecipe:
    """One checkpoint's."""

    model: Architecture
    planting: Planting
    seed: int
    dtype: torch.dtype
    parts: frozenset[str]  # of a layer: the resident tensors that the checkpoint has (`architecture.layer`)

    @property
    def layer(self) -> Layer:
        """Any of the layers: all are alike."""
        return self.model.layers[0]

    @property
    def neurons(self) -> int:
        """Of a layer's FFN."""
        return self.layer.ffn.neurons

    @property
    def rms(self) -> bool:
        """Whether norms are root mean square, without a bias."""
        return all(norm.kind == "rms" for norm in self.layer.norms.values())

    def generator(self, *what: object) -> torch.Generator:
        """The random source of one tensor."""
        text = repr((self.seed, self.model.d_model, self.neurons, *what))
        digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)

    def normal(self, scale: float, shape: tuple[int, ...], *what: object) -> Tensor:
        """Normally distributed float32 of a standard deviation."""
        return torch.randn(shape, generator=self.generator(*what)).mul_(scale)

    def rounded(self, tensor: Tensor) -> Tensor:
        """The values that the checkpoint's dtype holds, in float32."""
        return tensor.to(self.dtype).float()

    @property
    def direction(self) -> Tensor | None:
        """`[d_model]`: along it every row is constant, and no block writes. None where nothing is constant.

        Behind layer norms it is their bias b, behind root-mean-square norms a part of every embedding.
        """
        if self.rms:
            drawn = self.normal(1.0, (self.model.d_model,), "constant")
            return drawn.div_(drawn.norm())
        if "up.bias" in self.parts and self.layer.attention.rope is None:
            return None
        return self.rounded(self.normal(self.planting.norm_bias, (self.model.d_model,), "norm bias"))

    def constant(self, tensors: Tensors, place: NormPlace, h: Tensor) -> Constant | None:
        """Of rows h `[tokens, d_model]` behind the norm at `place`, one of the layer's `tensors`."""
        direction = self.direction
        if direction is None:
            return None
        if not self.rms:
            return Constant(direction, direction / direction.square().sum())
        weight = tensors[f"{NORM_PARTS[place]}.weight"] + self.layer.norms[place].offset
        dual = direction / weight
        return Constant(direction * weight, dual / (h @ dual).mean())


def calibration_tokens(recipe: SynthesisRecipe) -> Tensor:
    """Zipf-distributed ids: byte-pair vocabularies are ordered by frequency, about."""
    weights = 1 / (torch.arange(recipe.model.vocabulary) + 2.7)
    generator = recipe.generator("calibration")
    count = min(CALIBRATION_TOKENS, recipe.model.max_positions)
    return torch.multinomial(weights, count, replacement=True, generator=generator)


def without(matrix: Tensor, direction: Tensor | None) -> Tensor:
    """`[d_model, n]` with columns that have no component along `direction`; in place."""
    if direction is None:
        return matrix
    unit = direction / direction.norm()
    return matrix.sub_(torch.outer(unit, unit @ matrix))
