"""The decoder against transformers, on small checkpoints with every parameter random."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import DTYPES, VARIANTS, make_model, write_checkpoint
from decoding import LocalDecoder

from storage.convert import convert
from storage.format import Store

PROMPT = [2, 17, 40, 9, 77, 31, 250, 6, 101, 4, 55, 260]
TOLERANCE = 1e-4
CLOSE = 1e-3  # between the reference's two best: either may be chosen


def _store(base: Path, variant: str, dtype: str) -> Store:
    return convert(write_checkpoint(base / "checkpoint", variant, dtype), base / "store", name=variant)


def _reference(variant: str, dtype: str) -> Any:
    """The rounded weights in a float32 model; casting the model itself would round its rotary angles."""
    model = make_model(variant, "float32")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(getattr(torch, dtype)).float())
    return model


def _logits(model: Any, tokens: list[int]) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor([tokens])).logits[0].numpy()


CASES = [(variant, "float32") for variant in VARIANTS] + [
    (variant, dtype) for variant in ("opt", "falcon-7b", "falcon-rw") for dtype in DTYPES[1:]
]


@pytest.mark.parametrize(("variant", "dtype"), CASES)
def test_logits_are_transformers(tmp_path, variant, dtype):
    expected = _logits(_reference(variant, dtype), PROMPT)
    assert expected.std() >= 1
    with LocalDecoder(_store(tmp_path, variant, dtype)) as decoder:
        assert np.abs(decoder.prefill(PROMPT) - expected).max() < TOLERANCE
        decoder.length = 0
        for position, token in enumerate(PROMPT):
            assert np.abs(decoder.step(token) - expected[position]).max() < TOLERANCE
