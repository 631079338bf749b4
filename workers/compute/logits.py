"""What a model does to its head's products, on any device."""

from __future__ import annotations

import numpy as np

from storage.architecture import Architecture
from storage.codecs import F32


def finished(model: Architecture, logits: F32) -> F32:
    """Scaled and capped, in place: [rows, vocabulary]."""
    if model.logit_scale != 1:
        logits *= np.float32(model.logit_scale)
    if model.logit_softcap is not None:
        capped(logits, model.logit_softcap)
    return logits


def capped(scores: F32, most: float) -> None:
    """s becomes most · tanh(s / most), in place."""
    scores /= np.float32(most)
    np.tanh(scores, out=scores)
    scores *= np.float32(most)
