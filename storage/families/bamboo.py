"""TurboSparse-Mistral (arXiv 2406.05955): Mistral with the ReLU of gate and up, nine of ten neurons zero.

Its checkpoints also hold predictors of their own, which are not used.
"""

from __future__ import annotations

from dataclasses import replace

from storage.architecture import Architecture, Ffn
from storage.errors import UnsupportedModel
from storage.families import decoder, mistral
from storage.families.family import Settings


def architecture(config: Settings) -> Architecture:
    """Raises UnsupportedModel for an option, an activation or a value that is not supported."""
    model = mistral.architecture({"hidden_act": "relu", **config})
    layers = tuple(replace(layer, ffn=_rectified(layer.ffn)) for layer in model.layers)
    return replace(model, family="bamboo", layers=layers)


def _rectified(ffn: Ffn) -> Ffn:
    if ffn.activation != "relu":
        raise UnsupportedModel(
            f"bamboo with activation {ffn.activation!r} is not supported; supported is relu"
        )
    return replace(ffn, up_activation="relu")


BAMBOO = decoder.family("bamboo", architecture, biases=lambda _: decoder.Biases())
