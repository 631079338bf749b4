"""Choosing tokens: pure, repeatable, and within the limits asked for."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from pipeline.ring.sampling import Sampling
from workers.compute.sampling import candidates, choose, log_probability

logit_rows = hnp.arrays(np.float32, st.integers(1, 60), elements=st.floats(-30, 30, width=32))
samplings = st.builds(
    Sampling,
    temperature=st.floats(0.05, 5),
    top_k=st.integers(0, 70),
    top_p=st.floats(0.01, 1),
    seed=st.integers(-(2**63), 2**64),
)


@given(logits=logit_rows, seed=st.integers(0, 9), index=st.integers(0, 9))
def test_without_temperature_the_most_likely_is_chosen(logits, seed, index):
    assert choose(logits, Sampling(0, 5, 0.5, seed), index) == int(np.argmax(logits))
    assert choose(logits, Sampling(1, 1, 1, seed), index) == int(np.argmax(logits))


@settings(deadline=None)
@given(logits=logit_rows, sampling=samplings, index=st.integers(0, 10**6))
def test_a_draw_is_repeatable_and_among_the_candidates(logits, sampling, index):
    token = choose(logits, sampling, index)
    order, _ = candidates(logits, sampling)
    assert token == choose(logits, sampling, index)
    assert token in order or sampling.top_k == 1


@settings(deadline=None)
@given(logits=logit_rows, sampling=samplings)
def test_candidates_are_the_most_likely_and_sum_to_one(logits, sampling):
    order, probabilities = candidates(logits, sampling)
    assert len(set(order.tolist())) == order.size >= 1
    assert probabilities.sum() == pytest.approx(1)
    assert np.all(np.diff(probabilities) <= 0)
    if sampling.top_k:
        assert order.size <= sampling.top_k
    left_out = np.delete(logits, order)
    if left_out.size:
        assert left_out.max() <= logits[order].min()


@settings(deadline=None)
@given(logits=logit_rows, sampling=samplings)
def test_top_p_keeps_the_fewest_that_hold_it(logits, sampling):
    kept, _ = candidates(logits, sampling)
    order, probabilities = candidates(logits, Sampling(sampling.temperature, sampling.top_k, 1, 0))
    held = np.cumsum(probabilities)
    assert np.array_equal(kept, order[: kept.size])
    if kept.size < order.size:
        assert held[kept.size - 1] >= sampling.top_p - 1e-12
    if kept.size > 1:
        assert held[kept.size - 2] < sampling.top_p


def test_frequencies_are_the_probabilities():
    logits = np.log(np.array([0.5, 0.25, 0.15, 0.1], np.float32))
    sampling = Sampling(temperature=1, top_k=0, top_p=1, seed=3)
    drawn = np.bincount([choose(logits, sampling, index) for index in range(4000)], minlength=4) / 4000
    assert np.abs(drawn - [0.5, 0.25, 0.15, 0.1]).max() < 0.03


def test_seed_and_index_both_matter():
    logits = np.zeros(1000, np.float32)
    first = [choose(logits, Sampling(1, 0, 1, 1), index) for index in range(20)]
    second = [choose(logits, Sampling(1, 0, 1, 2), index) for index in range(20)]
    assert len(set(first)) > 10
    assert first != second


@given(logits=logit_rows)
def test_log_probabilities_are_those_of_a_distribution(logits):
    total = sum(np.exp(log_probability(logits, token)) for token in range(logits.size))
    assert total == pytest.approx(1)
