"""Threads of a prompt: results in order, and no more under way than there is room for."""

from __future__ import annotations

import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workers.compute.cpu.pool import Pool

ROOM = 10  # a thread


@settings(max_examples=40, deadline=None)
@given(weights=st.lists(st.integers(1, ROOM), max_size=40), threads=st.integers(1, 3))
def test_results_come_in_order_and_what_is_kept_is_bounded(weights: list[int], threads: int) -> None:
    pool, lock = Pool(threads), threading.Lock()
    begun, taken, most = 0, 0, 0

    def task(number: int) -> int:
        nonlocal begun, most
        with lock:
            begun += weights[number]
            most = max(most, begun - taken)
        return number

    found = []
    for number in pool.in_order(task, range(len(weights)), weights.__getitem__, ROOM):
        found.append(number)
        with lock:
            taken += weights[number]
    pool.close()
    assert found == list(range(len(weights)))
    assert most <= ROOM * threads


def test_a_task_that_fails_fails_its_caller() -> None:
    pool = Pool(2)

    def task(number: int) -> int:
        if number == 3:
            raise ValueError("three")
        return number

    with pytest.raises(ValueError, match="three"):
        list(pool.in_order(task, range(9), lambda _: 1, ROOM))
    pool.close()
