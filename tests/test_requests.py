"""Planning: every bundle lands in its slot exactly once, gaps are counted, limits are kept."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storage.layout import Layout, neuron
from workers.prefetcher.requests import IOV_MAX, RequestBuilder, Requests

STRIDE = 512
BASE = 1 << 40
SINK = 1 << 30


def builder(d_ff: int, slots: int, max_read: int = 4096, max_gap: int = 0) -> RequestBuilder:
    layout = Layout.uniform(4, d_ff, neuron("float16", STRIDE // 4))
    return RequestBuilder(BASE, slots, STRIDE, layout, max_read, max_gap, SINK)


def plan(one: RequestBuilder, layer: int, positions: list[int], slots: list[int]) -> Requests:
    return one.build(layer, np.array(positions, np.int32), np.array(slots, np.int32))


@dataclass
class Landed:
    """What a plan does, followed byte range by byte range."""

    slots: dict[int, int]  # slot → the bundle of the file that lands there
    gap_bytes: int


def follow(requests: Requests) -> Landed:
    landed = Landed({}, 0)
    for index in range(len(requests)):
        offset = int(requests.offsets[index])
        end = offset + int(requests.lengths[index])
        for address, length in requests.vector(index):
            assert length > 0
            assert length % STRIDE == 0
            if SINK <= address < BASE:
                landed.gap_bytes += length
            else:
                for at in range(0, length, STRIDE):
                    slot, rest = divmod(address + at - BASE, STRIDE)
                    assert rest == 0
                    assert slot not in landed.slots
                    landed.slots[slot] = (offset + at) // STRIDE
            offset += length
        assert offset == end
    return landed


@st.composite
def parts(draw: st.DrawFn) -> tuple[int, list[int], list[int]]:
    d_ff = draw(st.integers(1, 64))
    positions = draw(st.lists(st.integers(0, d_ff - 1), unique=True, max_size=d_ff))
    total = len(positions) + draw(st.integers(0, 4))
    if draw(st.booleans()):  # streamed: neighbours in neighbouring slots
        return d_ff, sorted(positions), list(range(len(positions)))
    return d_ff, positions, draw(st.permutations(range(total)))[: len(positions)]


@settings(max_examples=300, deadline=None)
@given(parts(), st.integers(0, 3), st.integers(4096, 20_000), st.integers(0, 5 * STRIDE))
def test_every_bundle_lands_in_its_slot_once(
    part: tuple[int, list[int], list[int]], layer: int, max_read: int, max_gap: int
) -> None:
    d_ff, positions, slots = part
    requests = plan(builder(d_ff, max(slots, default=0) + 1, max_read, max_gap), layer, positions, slots)
    landed = follow(requests)
    assert landed.slots == {
        slot: layer * d_ff + position for position, slot in zip(positions, slots, strict=True)
    }
    assert landed.gap_bytes == requests.gap_bytes
    assert requests.bundles == len(positions)
    assert requests.total_bytes == len(positions) * STRIDE + requests.gap_bytes
    assert (requests.lengths <= max_read).all()
    assert (requests.counts <= IOV_MAX).all()
    for index in range(len(requests)):
        for address, length in requests.vector(index):
            assert address >= BASE or length <= RequestBuilder.sink_bytes(STRIDE, max_gap)


@settings(max_examples=100, deadline=None)
@given(parts(), st.data())
def test_a_remainder_is_what_is_left(part: tuple[int, list[int], list[int]], data: st.DataObject) -> None:
    d_ff, positions, slots = part
    requests = plan(builder(d_ff, max(slots, default=0) + 1, 8192, STRIDE), 0, positions, slots)
    for index in range(len(requests)):
        done = data.draw(st.integers(0, int(requests.lengths[index]) - 1))
        rest = requests.remainder(index, done)
        assert int(rest.offsets[0]) == int(requests.offsets[index]) + done
        assert bytes_of(rest, 0) == bytes_of(requests, index)[done:]


def bytes_of(requests: Requests, index: int) -> list[int]:
    """The address of every byte of a read, in file order."""
    return [address + i for address, length in requests.vector(index) for i in range(length)]


def test_neighbours_become_one_read_with_merged_iovecs() -> None:
    requests = plan(builder(64, 64), 1, [10, 12, 11, 20], [4, 9, 5, 6])
    assert requests.offsets.tolist() == [(64 + 10) * STRIDE, (64 + 20) * STRIDE]
    assert requests.lengths.tolist() == [3 * STRIDE, STRIDE]
    assert requests.vector(0) == [(BASE + 4 * STRIDE, 2 * STRIDE), (BASE + 9 * STRIDE, STRIDE)]
    assert requests.scattered.tolist() == [True, False]
    assert requests.targets[1] == BASE + 6 * STRIDE
    assert requests.widths.tolist() == [2, STRIDE]


def test_small_gaps_are_read_and_counted_and_large_ones_are_not() -> None:
    positions, slots = [0, 2, 5], [0, 1, 2]
    assert len(plan(builder(8, 3, max_gap=0), 0, positions, slots)) == 3
    joined = plan(builder(8, 3, max_gap=STRIDE), 0, positions, slots)
    assert joined.lengths.tolist() == [3 * STRIDE, STRIDE]
    assert joined.gap_bytes == STRIDE
    assert joined.vector(0) == [(BASE, STRIDE), (SINK, STRIDE), (BASE + STRIDE, STRIDE)]
    assert plan(builder(8, 3, max_gap=2 * STRIDE), 0, positions, slots).gap_bytes == 3 * STRIDE


def test_a_streamed_layer_is_read_in_plain_reads_of_the_largest_size() -> None:
    requests = plan(builder(100, 100, max_read=16 * STRIDE), 0, list(range(100)), list(range(100)))
    assert requests.lengths.tolist() == [16 * STRIDE] * 6 + [4 * STRIDE]
    assert not requests.scattered.any()


def test_no_read_has_more_iovecs_than_the_system_takes() -> None:
    count = 2 * IOV_MAX + 5
    requests = plan(
        builder(count, 2 * count, max_read=1 << 30), 0, list(range(count)), list(range(0, 2 * count, 2))
    )
    assert requests.counts.tolist() == [IOV_MAX, IOV_MAX, 5]


def test_a_bundle_larger_than_the_largest_read_is_still_read_whole() -> None:
    requests = plan(builder(4, 4, max_read=STRIDE // 2), 0, [1, 2], [0, 1])
    assert requests.lengths.tolist() == [STRIDE, STRIDE]


def test_nothing_asked_for_is_no_read() -> None:
    requests = plan(builder(4, 4), 0, [], [])
    assert len(requests) == 0
    assert requests.total_bytes == 0


@pytest.mark.parametrize(
    ("positions", "slots", "complaint"),
    [([4], [0], "outside the layer"), ([-1], [0], "outside the layer"), ([1, 1], [0, 1], "twice"),
     ([1], [4], "outside the segment"), ([1], [-1], "outside the segment")],
)  # fmt: skip
def test_malformed_tables_are_refused(positions: list[int], slots: list[int], complaint: str) -> None:
    with pytest.raises(AssertionError, match=complaint):
        plan(builder(4, 4), 0, positions, slots)
