"""For every test: a private temporary directory and cache, no network, and nothing left behind."""

from __future__ import annotations

import gc
import os
import shutil
import tempfile
from collections.abc import Iterator

import leaks
import pytest

_private: list[str] = []


def pytest_configure(config: pytest.Config) -> None:
    """Rings of other programs on this machine must not look like leaks of ours, nor ours like theirs."""
    directory = tempfile.mkdtemp(prefix="fr-test-")  # short: socket paths are limited to 107 bytes
    _private.append(directory)
    os.environ.update(
        TMPDIR=directory,
        FLASHRING_HOME=os.path.join(directory, "home"),
        HF_HOME=os.path.join(directory, "hf"),
        HF_HUB_OFFLINE="1",
        HF_HUB_DISABLE_PROGRESS_BARS="1",
    )
    tempfile.tempdir = None  # read TMPDIR again


def pytest_unconfigure(config: pytest.Config) -> None:
    for directory in _private:
        shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture(scope="module", autouse=True)
def _libraries_are_not_searched_for_garbage() -> None:
    """Each test collects its garbage; what torch and others consist of would make that take 0.13 s."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _nothing_is_left_behind() -> Iterator[None]:
    before = leaks.take()
    yield
    left = leaks.since(before)
    if left:
        pytest.fail("left behind: " + "; ".join(left), pytrace=False)
