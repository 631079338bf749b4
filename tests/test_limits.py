"""What a machine refuses is said in words, with the limit's name."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any, NoReturn

import pytest

from pipeline.config import Config
from pipeline.ring import segments, supervisor
from pipeline.ring.limits import explained, refused
from pipeline.ring.supervisor import Supervisor
from storage.errors import RingError


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.EAGAIN, "ulimit -u"),
        (errno.EMFILE, "ulimit -n"),
        (errno.ENFILE, "fs.file-max"),
        (errno.ENOMEM, "no more memory"),
        (errno.EIO, "Input/output error"),
    ],
)
def test_a_refusal_has_the_limits_name(number: int, words: str) -> None:
    error = refused(OSError(number, os.strerror(number)), "a process for the cache worker")
    assert words in str(error)
    assert str(error).startswith("a process for the cache worker could not be had: ")


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ('RuntimeError("can\'t start new thread")', "ulimit -u"),
        ("libgomp: Thread creation failed: Resource temporarily unavailable", "pids.max"),
        ("ImportError: libx.so: failed to map segment from shared object", "ulimit -v"),
        ("OSError: [Errno 24] Too many open files", "ulimit -n"),
        ("ZeroDivisionError: division by zero", ""),
    ],
)
def test_last_words_are_explained(said: str, words: str) -> None:
    found = explained(said)
    assert found.startswith(said)
    assert words in found
    assert words or found == said


def no_plan(*_: Any) -> dict[str, int]:
    return {}


@pytest.mark.parametrize("number", [errno.EAGAIN, errno.EMFILE])
def test_processes_that_cannot_be_started(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> NoReturn:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(supervisor.segments, "create", no_plan)
    monkeypatch.setattr(supervisor.subprocess, "Popen", refuse)
    ring = Supervisor.__new__(Supervisor)
    ring._workers, ring._routes, ring._programs = [], {}, {}

    class Plan:
        whole = False

    with pytest.raises(RingError, match=r"a process for the predictor worker could not be had: no more"):
        ring._start(None, Config(), Plan(), False)  # type: ignore[arg-type]


def test_shared_memory_that_cannot_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> NoReturn:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(supervisor.segments, "create", refuse)
    ring = Supervisor.__new__(Supervisor)
    ring._workers = []
    with pytest.raises(RingError, match=r"shared memory could not be had: no more files may be open"):
        ring._start(None, Config(), None, False)  # type: ignore[arg-type]


@pytest.mark.parametrize("number", [errno.EPERM, errno.ENOSYS, errno.EACCES])
@pytest.mark.parametrize("shared", [True, False])
def test_a_system_that_forbids_memfd_gets_a_file_without_a_name(
    number: int, shared: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refuse(*_: Any) -> NoReturn:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(segments.os, "memfd_create", refuse)
    if not shared:
        monkeypatch.setattr(segments, "SHARED_MEMORY", str(tmp_path / "absent"))
    descriptor = segments._nameless("x", 4096)
    try:
        assert os.fstat(descriptor).st_nlink == 0
        assert os.fstat(descriptor).st_size == 4096
    finally:
        os.close(descriptor)


def test_a_memfd_beyond_the_limit_of_descriptors_stays_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> NoReturn:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(segments.os, "memfd_create", refuse)
    with pytest.raises(OSError, match="Too many open files"):
        segments._nameless("x", 4096)
