"""Where stores and compiled kernels are kept, with and without a home."""

from __future__ import annotations

import os
import pwd
from pathlib import Path

import pytest

from pipeline import directories
from storage.errors import UsageError


@pytest.fixture(autouse=True)
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FLASHRING_HOME", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"HOME": "/a"}, "/a/.cache/flashring"),
        ({"HOME": "/a", "XDG_CACHE_HOME": ""}, "/a/.cache/flashring"),
        ({"HOME": "/a", "XDG_CACHE_HOME": "/b"}, "/b/flashring"),
        ({"HOME": "/a", "XDG_CACHE_HOME": "/b", "FLASHRING_HOME": "~/c"}, "/a/c"),
    ],
)
def test_the_environment_decides(
    environment: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert directories.home() == Path(expected)


@pytest.mark.parametrize("empty", [True, False])
def test_without_home_the_list_of_users_decides(empty: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if empty:
        monkeypatch.setenv("HOME", "")
    listed = pwd.struct_passwd(("u", "x", 1, 1, "", "/listed", "/bin/sh"))
    monkeypatch.setattr(pwd, "getpwuid", lambda user: listed)
    assert directories.user_cache() == Path("/listed/.cache")


def test_a_user_without_any_home_is_told_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(user: int) -> None:
        raise KeyError(user)

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    with pytest.raises(UsageError, match="set HOME, or XDG_CACHE_HOME"):
        directories.home()


def test_a_file_that_could_not_be_written_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "result.json"
    directories.check_writable(file)
    file.touch()
    directories.check_writable(file)
    with pytest.raises(UsageError, match="it is a directory"):
        directories.check_writable(tmp_path)
    monkeypatch.setattr(os, "access", lambda path, mode: path != file)  # tests may run as root
    with pytest.raises(UsageError, match=r"result\.json cannot be written: it is there and not writable"):
        directories.check_writable(file)
