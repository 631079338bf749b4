"""The leak check notices what it is for."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import leaks
import pytest


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leaks, "PATIENCE", 0.01)


def test_nothing_is_found_where_nothing_was_left() -> None:
    assert leaks.since(leaks.take()) == []


def test_a_process_is_found() -> None:
    before = leaks.take()
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        (found,) = leaks.since(before)
        assert found.startswith(f"process {child.pid} ")
        child.kill()


def test_a_thread_is_found() -> None:
    before = leaks.take()
    end = threading.Event()
    thread = threading.Thread(target=end.wait, name="forgotten")
    thread.start()
    assert leaks.since(before) == ["thread forgotten"]
    end.set()
    thread.join()


def test_sockets_and_shared_memory_are_found() -> None:
    before = leaks.take()
    memory = os.memfd_create("forgotten")
    with socket.socket():
        found = leaks.since(before)
    os.close(memory)
    assert len(found) == 2
    assert any("/memfd:forgotten" in name for name in found)
    assert any("socket:" in name for name in found)
    assert leaks.since(before) == []


def test_names_in_shared_memory_are_found() -> None:
    before = leaks.take()
    name = Path("/dev/shm") / f"forgotten-{os.getpid()}"
    name.touch()
    found = leaks.since(before)
    name.unlink()
    assert str(name) in found


def test_a_directory_of_sockets_is_found() -> None:
    before = leaks.take()
    with tempfile.TemporaryDirectory(prefix="flashring-test-") as directory:
        assert leaks.since(before) == [f"directory {directory}"]
