"""For every test: a private temporary directory and cache, no network, and nothing left behind.

A test that starts a ring says so by the marker `ring`, or fails: `pytest -m "not ring"` stays quick.
"""

from __future__ import annotations

import gc
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

import leaks
import pytest
import rings

_private: list[str] = []
_guards: list[rings.Guard] = []


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--device",
        default="cpu",
        choices=("cpu", "torch-cpu", "cuda", "mps"),
        help="compute.device of every ring and decoder; other than cpu: only tests that have one run",
    )


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
        FLASHRING_DEVICE=config.getoption("--device"),
        OMP_WAIT_POLICY="passive",  # as workers/kernels has it: awake, torch's threads double the time
    )
    tempfile.tempdir = None  # read TMPDIR again
    _guards.append(rings.Guard(Path(directory)))


def pytest_unconfigure(config: pytest.Config) -> None:
    while _guards:
        _guards.pop().close()
    for directory in _private:
        shutil.rmtree(directory, ignore_errors=True)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Of another device than the CPU: what computes by the device that was asked for, and no more."""
    if config.getoption("--device") == "cpu":
        return
    wanted = [item for item in items if item.get_closest_marker("ring") or _decodes(item)]
    config.hook.pytest_deselected(items=[item for item in items if item not in wanted])
    items[:] = wanted
    for item in items:
        kernels = item.get_closest_marker("kernels")
        if kernels is not None:
            item.add_marker(pytest.mark.skip(reason=f"of the kernels: {kernels.args[0]}"))


def _decodes(item: pytest.Item) -> bool:
    """Whether the test's module has decoders without a ring."""
    return isinstance(item, pytest.Function) and hasattr(item.module, "LocalDecoder")


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(fixturedef: pytest.FixtureDef[object]) -> Generator[None, object, object]:
    with _guards[-1].fixture(fixturedef.baseid, fixturedef.argname):
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Function) -> Generator[None, object, object]:
    try:
        result = yield
    finally:  # a failed test's rings are not the next one's
        ring = _guards[-1].ring_of(item.nodeid, item.fixturenames)
    if ring and item.get_closest_marker("ring") is None:
        pytest.fail(f"{ring}: mark it with pytest.mark.ring", pytrace=False)
    return result


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


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Torch on one thread: equal sums in every run, and none that waits for another over tiny products."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def here(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs a program in this process: `here(main, *arguments)`. To start one takes up to two seconds."""

    def run(main: Callable[[], int], *arguments: object) -> subprocess.CompletedProcess[str]:
        monkeypatch.setattr(sys, "argv", ["run.py", *map(str, arguments)])
        capfd.readouterr()
        status = main()
        told = capfd.readouterr()
        return subprocess.CompletedProcess(arguments, status, told.out, told.err)

    return run
