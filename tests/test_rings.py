"""Tests that start a ring are known by the marker `ring`; none can forget it."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import rings

LIKE_A_RING = "import os, tempfile; os.rmdir(tempfile.mkdtemp(prefix=f'flashring-{os.getpid()}-'))"
NOTICED = pytest.mark.xfail(strict=True, raises=pytest.fail.Exception, reason="it must be noticed")


@pytest.fixture
def watch(tmp_path: Path) -> Iterator[rings.Watch]:
    made = rings.Watch(tmp_path)
    yield made
    made.close()


def test_rings_are_counted_and_nothing_else(watch: rings.Watch, tmp_path: Path) -> None:
    assert watch.count() == 0
    for name in ("flashring-12-abc", "flashring-13-def", "pytest-1", "flashring.log"):
        (tmp_path / name).mkdir()
        (tmp_path / name).rmdir()
    assert watch.count() == 2
    assert watch.count() == 2


def test_a_directory_that_is_not_there_cannot_be_watched(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        rings.Watch(tmp_path / "gone")


@NOTICED
def test_a_ring_without_the_marker() -> None:
    os.rmdir(tempfile.mkdtemp(prefix=f"flashring-{os.getpid()}-"))


@NOTICED
def test_a_ring_of_another_process_without_the_marker() -> None:
    subprocess.run([sys.executable, "-c", LIKE_A_RING], check=True)


@pytest.mark.ring
def test_the_marker_is_enough() -> None:
    subprocess.run([sys.executable, "-c", LIKE_A_RING], check=True)


@pytest.fixture(scope="module")
def ring_for_several() -> None:
    os.rmdir(tempfile.mkdtemp(prefix=f"flashring-{os.getpid()}-"))


@NOTICED
@pytest.mark.usefixtures("ring_for_several")
def test_the_first_who_uses_a_fixtures_ring() -> None:
    pass


@NOTICED
@pytest.mark.usefixtures("ring_for_several")
def test_the_next_who_uses_it() -> None:
    pass
