"""Files that are replaced whole or not at all, and reads that leave the page cache alone."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from storage import files


def test_a_file_has_its_old_content_until_the_new_one_is_whole(tmp_path):
    path = tmp_path / "file"
    files.write_whole(path, b"old")
    with files.replacing(path) as new:
        new.write(b"new")
        new.flush()
        assert path.read_bytes() == b"old"
        assert (tmp_path / "file.tmp").read_bytes() == b"new"
    assert path.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("shared", [False, True])
def test_an_interrupted_write_leaves_the_old_content_alone(tmp_path, shared):
    path = tmp_path / "file"
    files.write_whole(path, b"old")

    def interrupted() -> None:
        with files.replacing(path, shared=shared) as new:
            new.write(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_what_the_system_refuses_changes_nothing(tmp_path, monkeypatch, step):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    files.write_whole(tmp_path / "file", b"old")
    monkeypatch.setattr(os, step, full)
    with pytest.raises(OSError, match="No space left"):
        files.write_whole(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_a_write_is_synced_before_it_has_its_name_and_the_name_after(tmp_path, monkeypatch):
    steps: list[str] = []
    fsync, rename = os.fsync, os.replace

    def synced(descriptor: int) -> None:
        steps.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    def renamed(source: Path, target: Path) -> None:
        steps.append(f"{source.name} → {target.name}")
        rename(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", renamed)
    files.write_whole(tmp_path / "file", b"data")
    assert steps == ["file.tmp", "file.tmp → file", tmp_path.name]


def test_processes_that_share_a_file_write_under_names_of_their_own(tmp_path):
    with files.replacing(tmp_path / "file", shared=True) as new:
        assert Path(new.name).name == f"file.{os.getpid()}.tmp"


def test_a_directory_is_published_like_a_file(tmp_path):
    partial = tmp_path / ".made"
    partial.mkdir()
    (partial / "one").write_bytes(b"1")
    files.publish(partial, tmp_path / "made")
    assert (tmp_path / "made" / "one").read_bytes() == b"1"
    assert not partial.exists()


def test_direct_reads_fall_back_to_the_page_cache(tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(bytes(8192))
    asked: list[int] = []
    real = os.open

    def without_direct(path: Path, flags: int) -> int:
        asked.append(flags)
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(path, flags)

    monkeypatch.setattr(os, "open", without_direct)
    descriptor = files.open_direct(tmp_path / "file")
    os.close(descriptor)
    assert [bool(flags & os.O_DIRECT) for flags in asked] == [True, False]


def test_a_missing_file_is_said_to_be_missing(tmp_path):
    with pytest.raises(FileNotFoundError):
        files.open_direct(tmp_path / "none")


def test_what_is_read_once_is_dropped_from_the_page_cache(tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"0123456789")
    dropped: list[tuple[int, int, int]] = []
    monkeypatch.setattr(os, "posix_fadvise", lambda _, *told: dropped.append(told))
    target = bytearray(4)
    with (tmp_path / "file").open("rb") as file:
        assert files.read_once(file.fileno(), target, 3) == 4
        assert target == b"3456"
        assert files.read_once(file.fileno(), target, 8) == 2
        assert files.read_once(file.fileno(), target, 10) == 0
    assert dropped == [(3, 4, os.POSIX_FADV_DONTNEED), (8, 2, os.POSIX_FADV_DONTNEED)]
