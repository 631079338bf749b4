"""Attention that sees distance alone: constant queries and keys whose rotation makes running means.

Rotation by ω a token makes the product of two constants Σ_j q_j k_j cos(ω_j Δ). A head puts its queries on
frequencies around the inverse of its reach. Even heads reach far, odd ones only the tokens before. A window
cuts off what lies beyond it, and sinks are drawn so small that next to nothing goes there.
"""

from __future__ import annotations

import math

import numpy as np

from storage.architecture import Attention, YarnScaling
from storage.codecs import F32
from workers.compute.positions import frequencies
from workers.lab.synthesis.mixture import draw
from workers.lab.synthesis.mixture.planting import MixturePlanting

CALIBRATION = 320  # tokens


def queries(a: Attention, planting: MixturePlanting, *what: object) -> F32:
    """Constant queries [heads, head_dim], such that a product with `keys` has the preset's strength."""
    spread = np.random.Generator(draw.source(*what, "reach")).random(a.heads)
    usual = np.where(np.arange(a.heads) % 2, planting.near, planting.reach)
    reach = usual * 2 ** (spread - 0.5)
    turns = _frequencies(a)
    weights = np.exp(-(np.log(np.outer(reach, turns)) ** 2) / 2)
    weights *= planting.reach_strength / _scale(a) / weights.sum(axis=1, keepdims=True)
    made = np.zeros((a.heads, a.head_dim), np.float32)
    made[:, : turns.size] = weights
    return made


def keys(a: Attention) -> F32:
    """[head_dim], of every head."""
    made = np.zeros(a.head_dim, np.float32)
    made[: _frequencies(a).size] = 1
    return made


def left(a: Attention, constant: F32, vocabulary: int, seed: int) -> float:
    """What a mean of random vectors, one a token id, keeps of their energy.

    `constant` [head_dim] is a head's query; the ids are as unevenly frequent as a text's.
    """
    turns = _frequencies(a)
    distances = np.arange(CALIBRATION)
    logits = np.cos(np.outer(distances, turns)) @ constant[: turns.size] * _scale(a)
    weights = np.exp(logits - logits.max())
    weights /= weights.sum()
    frequent = 1 / (np.arange(vocabulary) + 2.7)
    generator = np.random.Generator(draw.source(seed, "calibration"))
    energies = []
    for _ in range(8):
        ids = generator.choice(vocabulary, CALIBRATION, p=frequent / frequent.sum())
        energies.append(float(np.square(np.bincount(ids, weights)).sum()))
    return math.fsum(energies) / len(energies)


def _scale(a: Attention) -> float:
    """Of products; YaRN makes queries and keys longer."""
    assert a.rope is not None
    longer = a.rope.scaling.magnitude if isinstance(a.rope.scaling, YarnScaling) else 1.0
    return a.scale * longer**2


def _frequencies(a: Attention) -> F32:
    assert a.rope is not None
    return frequencies(a.rope, a.head_dim, CALIBRATION)
