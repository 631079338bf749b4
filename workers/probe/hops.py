"""What a message between two processes of a ring costs: from when one sends it to when the other has it.

The other process is this module; between two messages the first one computes a while, as a ring's does, so
that caches and cores are as a ring finds them.
"""

from __future__ import annotations

import contextlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from pipeline.launch import module_command, module_environment
from pipeline.ring.channel import Channel
from pipeline.ring.messages import PartDone, Stop
from pipeline.ring.promptness import be_prompt
from storage.errors import RingError

NEAR, FAR = "near", "far"
ROUNDS: Final = 150
PATIENCE: Final = 10.0  # seconds


def hop(between: Callable[[], object]) -> float:
    """Seconds of one message, half of the way there and back; `between` is what happens between two.

    Raises RingError where the other process does not answer.
    """
    with (
        tempfile.TemporaryDirectory(prefix="flashring-hops-") as name,
        Channel(Path(name), (NEAR,)) as channel,
    ):
        other = subprocess.Popen(
            module_command("workers.probe.hops", name), env=module_environment(), stdin=subprocess.DEVNULL
        )
        try:
            found = [_there_and_back(channel, between, number) for number in range(ROUNDS)]
        finally:
            with contextlib.suppress(OSError):
                channel.send(FAR, Stop())
            try:
                other.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                other.kill()
                other.wait()
    return statistics.median(found[ROUNDS // 3 :]) / 2


def _there_and_back(channel: Channel, between: Callable[[], object], number: int) -> float:
    between()
    started = time.perf_counter()
    channel.send(FAR, PartDone(0, number, 0, 0))
    if channel.receive(NEAR, PATIENCE) is None:
        raise RingError(f"a process of the probe does not answer within {PATIENCE:.0f} s")
    return time.perf_counter() - started


def main(directory: str) -> None:
    """Send back what comes, until Stop or silence."""
    be_prompt()
    with Channel(Path(directory), (FAR,)) as channel:
        while (message := channel.receive(FAR, PATIENCE)) is not None and not isinstance(message, Stop):
            channel.send(NEAR, message)


if __name__ == "__main__":
    main(sys.argv[1])
