"""A checkpoint as transformers reads it, with its FFNs' activations in our hands.

`Network` is a model for causal language modelling in float32. `swap` puts ReLU in the place of its activation
(of the gate, in gated FFNs); the parameters and their names stay those of the checkpoint, and of
`config.json` one setting changes, so that `run.py convert` reads what `write` wrote.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from storage.builtin.network import PenalisedReLU
from storage.checkpoint import CONFIG
from storage.errors import CheckpointError, UnsupportedModel, UsageError, reason
from storage.json_object import read_json
from storage.tokenizer import sources

RELU = "relu"


@dataclass(frozen=True, slots=True)
class Place:
    """Where a family's FFNs are, in transformers' class and in `config.json`."""

    decoder: str
    layers: str  # of the decoder
    activation: str  # of a layer's `mlp`
    setting: str


_LLAMA = Place("model", "layers", "act_fn", "hidden_act")
PLACES = {
    "falcon": Place("transformer", "h", "act", "activation"),
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "smollm3"), _LLAMA),
}


class Activation(nn.Module):
    """A ReLU that is penalised by its L1 norm, or the activation that was there; counts what is not zero."""

    def __init__(self, old: nn.Module, swapped: bool) -> None:
        super().__init__()
        self.old, self.swapped = old, swapped
        self.slope = torch.zeros(())  # gradient of the penalty by one activation
        self.active = self.all = 0  # values not zero, and values, since `reset`

    def forward(self, x: Tensor) -> Tensor:
        if not self.swapped:
            kept: Tensor = self.old(x)
            return kept
        found: Tensor = PenalisedReLU.apply(x, self.slope)  # type: ignore[no-untyped-call]
        self.active += int(torch.count_nonzero(found.detach()))
        self.all += found.numel()
        return found

    def reset(self) -> None:
        self.active = self.all = 0


@dataclass(frozen=True, slots=True)
class Network:
    """A model for causal language modelling, and where its FFNs are."""

    model: Any  # transformers' own
    place: Place
    config: dict[str, Any]

    @classmethod
    def open(cls, checkpoint: Path, device: str) -> Network:
        """In float32. Raises UsageError without transformers, and for a family that is not in `PLACES`."""
        config = read_json(checkpoint / CONFIG)
        place = PLACES.get(str(config.get("model_type")))
        if place is None:
            raise UnsupportedModel(
                f"relufy knows the FFNs of {', '.join(PLACES)}, not of {config.get('model_type')!r}"
            )
        found = cls(_read(checkpoint, device), place, config)
        for mlp in found.ffns:
            setattr(mlp, place.activation, Activation(getattr(mlp, place.activation), swapped=False))
        return found

    @property
    def decoder(self) -> Any:
        return self.model.get_submodule(self.place.decoder)

    @property
    def ffns(self) -> list[Any]:
        return [layer.mlp for layer in getattr(self.decoder, self.place.layers)]

    @property
    def activations(self) -> list[Activation]:
        return [getattr(mlp, self.place.activation) for mlp in self.ffns]

    @property
    def is_relu(self) -> bool:
        return bool(self.config.get(self.place.setting) == RELU)

    def swap(self) -> Network:
        """The same model, its activation ReLU from now on; its config says so."""
        for one in self.activations:
            one.swapped = True
        return Network(self.model, self.place, {**self.config, self.place.setting: RELU})

    def hidden(self, ids: Tensor) -> Tensor:
        """Normed hidden states [rows, length, d_model] of `ids` [rows, length]."""
        found: Tensor = self.decoder(input_ids=ids, use_cache=False).last_hidden_state
        return found

    def head(self, hidden: Tensor) -> Tensor:
        """Logits."""
        found: Tensor = self.model.get_output_embeddings()(hidden)
        return found

    @contextmanager
    def outputs(self) -> Iterator[list[Tensor]]:
        """Each FFN's output, in the order of the layers, as they come."""
        seen: list[Tensor] = []
        hooks = [mlp.register_forward_hook(lambda _, __, out: seen.append(out)) for mlp in self.ffns]
        try:
            yield seen
        finally:
            for hook in hooks:
                hook.remove()

    def write(self, source: Path, directory: Path) -> None:
        """A checkpoint in the source's number format, with the source's tokenizer."""
        directory.mkdir(parents=True, exist_ok=True)
        tied = bool(self.model.config.tie_word_embeddings)
        tensors = {
            name: one.detach().to("cpu", _dtype(self.config)).contiguous()
            for name, one in self.model.state_dict().items()
            if not (tied and name == "lm_head.weight")
        }
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
        (directory / CONFIG).write_text(json.dumps(self.config, indent=2) + "\n", encoding="utf-8")
        for file in sources(source):
            target = directory / file.relative_to(source)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)


def _dtype(config: dict[str, Any]) -> torch.dtype:
    name = config.get("torch_dtype") or config.get("dtype") or "bfloat16"
    found = getattr(torch, str(name), None)
    return found if isinstance(found, torch.dtype) else torch.bfloat16


def _read(checkpoint: Path, device: str) -> Any:
    try:
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging
    except ImportError:
        raise UsageError('relufy needs transformers: pip install -c constraints.txt -e ".[dev]"') from None
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
        nn.Module.to(model, device)
        return model.train(False)  # no dropout; gradients are taken all the same
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"transformers cannot read {checkpoint}: {reason(error)}") from error
