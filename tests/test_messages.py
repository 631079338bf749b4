"""Messages of the ring on the wire: a step stands among the other values, and every value is checked."""

from __future__ import annotations

import msgpack
import pytest

from pipeline.ring.messages import (
    HiddenReady,
    NeuronsPredicted,
    ProtocolError,
    RingReady,
    Step,
    decode,
    encode,
)

TOKEN = Step(number=9, first=30, count=1, every=False)
PROMPT = Step(number=9, first=0, count=4, every=True)


@pytest.mark.parametrize(
    "message",
    [
        RingReady(),
        HiddenReady(5, TOKEN, -1, 1, 26),
        HiddenReady(5, PROMPT, 2, 2, 26, chosen=(3, 7, 1), kept=2),
        NeuronsPredicted(5, TOKEN, 2, False, False, certain=3, doubtful=1, keep=None, done=26),
        NeuronsPredicted(5, TOKEN, 2, False, True, certain=0, doubtful=0, keep=4, done=26),
    ],
)
def test_a_message_is_read_as_it_was_written(message):
    assert decode(encode(message)) == message


def test_a_step_is_four_values_in_its_place():
    assert msgpack.unpackb(encode(HiddenReady(5, TOKEN, -1, 1, 26))) == [
        20,
        5,
        9,
        30,
        1,
        False,
        -1,
        1,
        26,
        [],
        0,
    ]


@pytest.mark.parametrize(
    "values",
    [
        [20, 5, 9, 30, 1, 0, -1, 1, 26, [], 0],  # a number for `every`
        [20, 5, [9, 30, 1, False], -1, 1, 26, [], 0],
        [20, 5, 9, False, -1, 1, 26],  # of version 1
        [20, 5, 9, 30, 1, False, -1, 1, 26],  # of version 2
        [20, 5, 9, 30, 1, False, -1, 1, 26, [], 0, 0],
        [20, 5, 9, 30, 1, True, 2, 1, 26, ["7"], 0],
    ],
)
def test_anything_else_is_refused(values):
    with pytest.raises(ProtocolError):
        decode(msgpack.packb(values))


def test_listed_ids_are_of_certain_doubtful_and_kept_neurons():
    assert NeuronsPredicted(5, TOKEN, 2, False, False, certain=3, doubtful=1, keep=None, done=26).listed == 4
    assert NeuronsPredicted(5, TOKEN, 2, False, True, certain=0, doubtful=0, keep=4, done=26).listed == 4
    assert NeuronsPredicted(5, PROMPT, 2, False, False, certain=5, doubtful=0, keep=2, done=26).listed == 5
    assert NeuronsPredicted(5, TOKEN, 2, True, True, certain=0, doubtful=0, keep=None, done=26).listed == 0
