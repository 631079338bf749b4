"""Where things are kept, for users whose home, cache or runtime directory is not theirs to write."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from checkpoints import write_checkpoint

from pipeline import directories
from pipeline.models.names import find_source
from pipeline.serving import endpoint
from storage.errors import UsageError

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An environment that names none, with a temporary directory of the test's."""
    for name in ("FLASHRING_HOME", "XDG_CACHE_HOME", "NUMBA_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "user"))
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    return tmp_path


def blocked(path: Path) -> Path:
    """A place where nobody can make a directory, not even root."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("a file")
    return path


def test_compiled_kernels_are_kept_in_the_users_cache(places: Path) -> None:
    assert directories.kernel_cache() == (places / "user" / ".cache" / "flashring" / "numba", "")


def test_homes_share_the_users_cache(places: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASHRING_HOME", str(places / "home"))
    assert directories.kernel_cache() == (places / "user" / ".cache" / "flashring" / "numba", "")


def test_without_a_home_they_are_kept_in_flashrings(places: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocked(places / "user")
    monkeypatch.setenv("FLASHRING_HOME", str(places / "home"))
    path, why = directories.kernel_cache()
    assert path == places / "home" / "numba"
    assert path.is_dir()
    assert str(places / "user") in why


def test_with_no_place_at_all_they_are_kept_for_a_while(places: Path) -> None:
    blocked(places / "user")
    path, why = directories.kernel_cache()
    assert path == places / "tmp" / f"flashring.{os.getuid()}" / "numba"
    assert why
    assert path.parent.stat().st_mode & 0o077 == 0


def test_code_is_not_loaded_from_a_directory_that_others_write(places: Path) -> None:
    blocked(places / "user")
    (places / "tmp" / f"flashring.{os.getuid()}").mkdir(mode=0o777)
    (places / "tmp" / f"flashring.{os.getuid()}").chmod(0o777)
    with pytest.raises(UsageError, match=r"no place for compiled kernels: .*is not this user's alone"):
        directories.kernel_cache()
    (places / "tmp" / f"flashring.{os.getuid()}").rmdir()
    (places / "tmp" / f"flashring.{os.getuid()}").symlink_to(places)
    with pytest.raises(UsageError, match="is not this user's alone"):
        directories.kernel_cache()


def test_a_cache_that_was_asked_for_and_cannot_be_written_is_said(
    places: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(blocked(places / "asked")))
    path, why = directories.kernel_cache()
    assert path == places / "user" / ".cache" / "flashring" / "numba"
    assert str(places / "asked") in why
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(places / "other"))
    assert directories.kernel_cache() == (places / "other", "")


def test_kernels_load_with_flashring_home_alone(places: Path) -> None:
    """As in a container: no home, and an installation that is not ours to write."""
    blocked(places / "user")
    left = {name: value for name, value in os.environ.items() if name not in ("XDG_CACHE_HOME", "HOME")}
    environment = {**left, "HOME": str(places / "user"), "FLASHRING_HOME": str(places / "home")}
    line = "import os, workers.kernels; print(os.environ['NUMBA_CACHE_DIR'])"
    done = subprocess.run(
        [sys.executable, "-c", line], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout.strip()) == (0, str(places / "home" / "numba")), done.stderr


def test_another_users_runtime_directory_is_not_used(places: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `su` and `sudo -E` leave it behind."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(places))
    assert endpoint.default_endpoint() == f"ipc://{places}/flashring.{os.getuid()}/ring.sock"
    monkeypatch.setattr(endpoint.os, "getuid", lambda: 4321)
    assert endpoint.default_endpoint() == f"ipc://{places}/tmp/flashring.4321/ring.sock"


@pytest.mark.parametrize("name", ["x" * 250, "ü" * 120, "name with spaces 龍", "-"])
def test_a_checkpoint_of_any_name_has_a_store(
    name: str, places: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLASHRING_HOME", str(places / "home"))
    store = find_source(str(write_checkpoint(places / name))).open_store()
    assert len(os.fsencode(store.path.name)) <= 200
    assert store.manifest.name == name
    assert find_source(str(places / name)).open_store().path == store.path
