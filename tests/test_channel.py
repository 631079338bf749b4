"""The ring's channels end at once, whatever an interrupt left in their way."""

from __future__ import annotations

import threading
from pathlib import Path

import zmq

from pipeline.ring.channel import Channel

PATIENCE = 20.0  # seconds for what takes milliseconds


def test_a_socket_that_nobody_noted_does_not_hold_up_the_end(tmp_path: Path) -> None:
    """An interrupt between a socket's making and its noting: the traceback keeps it open."""
    channel = Channel(tmp_path, ("inbox",))
    kept = channel._socket(zmq.PUSH)
    end = threading.Thread(target=channel.close, daemon=True)
    end.start()
    end.join(PATIENCE)
    assert not end.is_alive()
    assert kept.closed
