"""A checkpoint or a GGUF file as transformers reads it, in float32: what our own reading is held against.

transformers comes with the extra `dev`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from storage.errors import CheckpointError, UsageError, reason
from storage.gguf.parts import is_gguf
from workers.lab.offline.scoring import Scored, score_logits

BLOCK = 32  # values that are rounded together


class TransformersModel:
    """Scores token sequences, one at a time."""

    def __init__(self, model: Any) -> None:
        """`model`: of transformers, for causal language modelling."""
        self.model = model.float().eval()

    @classmethod
    def open(cls, path: Path) -> TransformersModel:
        """Of a checkpoint's directory, or a GGUF file.

        Raises UsageError without transformers, CheckpointError for what it cannot read.
        """
        try:
            import transformers  # noqa: F401 - told here, before anything is read
        except ImportError:
            raise UsageError(
                'the reference needs transformers: pip install -c constraints.txt -e ".[dev]"'
            ) from None
        try:
            return cls(_of_gguf(path) if is_gguf(path) else _of_checkpoint(path))
        except (OSError, ValueError, RuntimeError) as error:
            raise CheckpointError(f"transformers cannot read {path}: {reason(error)}") from error

    def round_activations(self) -> None:
        """From now on round what enters a matrix, as llama.cpp does for low bits: 8 bits, by blocks of 32."""
        for module in self.model.modules():
            if isinstance(module, torch.nn.Linear):
                module.register_forward_pre_hook(lambda _, given: (_rounded(given[0]), *given[1:]))

    def logits(self, tokens: Sequence[int]) -> torch.Tensor:
        """Of every token, `[tokens, vocabulary]` float32."""
        with torch.no_grad():
            found: torch.Tensor = self.model(torch.tensor([list(tokens)])).logits[0]
        return found

    def score(
        self,
        sequences: Sequence[Sequence[int]],
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> list[Scored]:
        """As `scoring.score`."""
        found = []
        for one in sequences:
            found.append(score_logits(self.logits(one[:-1]), np.array(one[1:], np.int64)))
            progress(len(found), len(sequences))
        return found


def _of_checkpoint(path: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


def _of_gguf(path: Path) -> Any:
    """By the steps of `from_pretrained`, which itself wants accelerate for a GGUF file."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    read = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=model)
    missing, unknown = model.load_state_dict(read["tensors"], strict=False, assign=True)
    model.tie_weights()
    tied = set(getattr(model, "all_tied_weights_keys", ()))
    if lost := [*(set(missing) - tied), *unknown]:
        raise ValueError(f"it has no place for, or lacks, {', '.join(sorted(lost))}")
    return model


def _rounded(x: torch.Tensor) -> torch.Tensor:
    """To whole multiples of a block's scale, its largest magnitude ÷ 127, which itself is a float16."""
    blocks = x.reshape(-1, BLOCK)
    scale = blocks.abs().amax(dim=1, keepdim=True) / 127
    codes = torch.where(scale > 0, blocks / scale, 0).round()
    return (codes * scale.half().float()).reshape(x.shape)
