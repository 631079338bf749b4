"""The model of time: what must hold whatever the machine and the model are."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from machine import RATES

from pipeline.planner import pace
from pipeline.planner.pace import Rates, Work, missed, worth_more

share = st.floats(0.001, 0.999)
FORECASTS = ("whole", "every", "refined", "ahead", "own")
WORK = Work(
    layers=32,
    matrices={"float16": 4.3e9},
    head={"float16": 0.4e9},
    kept=1e8,
    dots={"float16": 4e8},
    sums={"float16": 2e8},
    vocabulary=50_000,
    forecast="refined",
    scored=2e8,
    flash=2.6e8,
    request=16384,
    prompt_flash=8e9,
    prompt_request=1 << 20,
    parameters=6.7e9,
    load=4.7e9,
)


@given(share, share, st.floats(0, 50))
def test_what_is_missed_is_a_share_that_falls_with_slots(slots: float, wanted: float, local: float) -> None:
    assert 0 <= missed(slots, wanted, local) <= 1
    assert missed(min(1.0, slots + 0.1), wanted, local) <= missed(slots, wanted, local)
    assert missed(0, wanted, local) == 1
    assert missed(1, wanted, local) == 0


@given(share, share, st.floats(0.01, 20))
def test_a_locality_is_found_again_from_what_it_makes(slots: float, wanted: float, local: float) -> None:
    assert pace.locality(slots, wanted, missed(slots, wanted, local)) == pytest.approx(local, rel=1e-6)


def test_without_misses_a_locality_is_infinite_and_without_slots_unknown() -> None:
    assert math.isinf(pace.locality(0.5, 0.1, 0))
    assert pace.locality(0, 0.1, 0.5) == pace.LOCALITY


@given(st.floats(1, 1 << 24))
def test_reads_of_more_bytes_are_never_slower(request_bytes: float) -> None:
    assert RATES.reading(request_bytes) <= RATES.reading(2 * request_bytes) * (1 + 1e-9)


@pytest.mark.parametrize(("size", "rate"), RATES.disk)
def test_a_measured_size_of_reads_has_its_measured_rate(size: int, rate: float) -> None:
    assert RATES.reading(size) == pytest.approx(rate)


def test_only_reads_in_order_have_the_rate_of_streams() -> None:
    quicker = replace(RATES, stream=2 * RATES.disk[-1][1])
    work = replace(WORK, request=float(1 << 20))
    for forecast in FORECASTS[1:]:
        before, after = (
            pace.pace(rates, replace(work, forecast=forecast)).reading - work.layers * RATES.latency
            for rates in (replace(RATES, stream=RATES.disk[-1][1]), quicker)
        )
        assert after == pytest.approx(before / 2 if forecast == "every" else before)


def test_smaller_reads_than_were_measured_come_as_often() -> None:
    assert RATES.reading(1024) == pytest.approx(0.1e9)


@pytest.mark.parametrize("forecast", FORECASTS)
def test_parts_add_up_and_none_is_negative(forecast: str) -> None:
    found = pace.pace(RATES, replace(WORK, forecast=forecast, flash=0.0 if forecast == "whole" else 2.6e8))
    parts = (found.memory, found.units, found.layers, found.head, found.disk)
    assert min(parts) >= 0
    assert sum(parts) == pytest.approx(found.total)


@pytest.mark.parametrize("forecast", FORECASTS[1:])
@given(more=st.floats(1, 100))
def test_more_reading_is_never_quicker_and_nothing_hides_what_is_not_computed(
    forecast: str, more: float
) -> None:
    work = replace(WORK, forecast=forecast)
    few, many = pace.pace(RATES, work), pace.pace(RATES, replace(work, flash=more * work.flash))
    assert many.total >= few.total - 1e-12
    assert many.total >= many.reading - 1e-12
    assert few.total >= pace.pace(RATES, replace(work, flash=0.0)).total


@given(st.sampled_from(FORECASTS), st.floats(1, 10))
def test_a_quicker_memory_is_never_slower(forecast: str, times: float) -> None:
    kernels = {
        name: pace.Kernel(times * one.product, times * one.dots, times * one.sums)
        for name, one in RATES.kernels.items()
    }
    quicker: Rates = replace(RATES, read=times * RATES.read, kernels=kernels)
    work = replace(WORK, forecast=forecast, flash=0.0 if forecast == "whole" else WORK.flash)
    assert pace.pace(quicker, work).total <= pace.pace(RATES, work).total + 1e-12


def test_where_nobody_is_asked_a_token_is_its_bytes_and_its_launches() -> None:
    work = Work(2, {"float16": 25e9}, {}, 0.0, {}, {}, vocabulary=0, forecast="whole")
    assert pace.pace(RATES, work).total == pytest.approx(
        pace.AMONG + (2 * pace.LAUNCHES + 1) * RATES.launch + pace.TOKEN * RATES.hop
    )


def test_a_format_that_was_not_measured_is_taken_for_the_slowest() -> None:
    kernels = {"q8": pace.Kernel(2e9, 2e9, 2e9), "q4": pace.Kernel(1e9, 1e9, 1e9)}
    assert replace(RATES, kernels=kernels).kernel("mxfp4") == kernels["q4"]


def test_the_first_answer_takes_start_loading_reading_and_arithmetic() -> None:
    seconds = pace.first_answer(RATES, WORK, prompt=100, start=2.0)
    assert seconds == pytest.approx(2 + 4.7 / 2 + 8 / 2 + 2 * 100 * 6.7e9 / 200e9)


def test_memory_that_brings_less_than_a_fiftieth_is_not_worth_it() -> None:
    assert worth_more([(1, 5.0), (2, 1.01), (3, 1.0)]) == 2
    assert worth_more([(1, 5.0), (2, 3.0), (3, 1.0)]) == 3
