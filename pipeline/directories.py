"""Where this program keeps what it makes for a user."""

from __future__ import annotations

import os
import pwd
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path

from storage.errors import UsageError, reason


def home() -> Path:
    """Of converted stores and the like: `$FLASHRING_HOME`, or `flashring` in the user's cache."""
    if chosen := os.environ.get("FLASHRING_HOME"):
        return Path(chosen).expanduser()
    return user_cache() / "flashring"


def user_cache() -> Path:
    """`$XDG_CACHE_HOME`, or `.cache` at the user's home. Raises UsageError for a user without one."""
    if chosen := os.environ.get("XDG_CACHE_HOME"):
        return Path(chosen)
    return Path(os.environ.get("HOME") or _listed_home()) / ".cache"


def kernel_cache() -> tuple[Path, str]:
    """Where compiled kernels are kept, and why it is not the user's cache; empty where it is.

    What NUMBA_CACHE_DIR says first; then the cache, which all homes of ours share; then `home()`; then a
    directory of this user's own for as long as the machine runs. Raises UsageError where none can be written.
    """
    reasons: list[str] = []
    asked = os.environ.get("NUMBA_CACHE_DIR")
    places: list[Callable[[], Path]] = [lambda: Path(asked)] if asked else []
    for place in (
        *places,
        lambda: user_cache() / "flashring" / "numba",
        lambda: home() / "numba",
        _temporary,
    ):
        try:
            path = place()
            path.mkdir(parents=True, exist_ok=True)
            if os.access(path, os.W_OK | os.X_OK):
                return path, reasons[0] if reasons else ""
            reasons.append(f"{path} cannot be written")
        except OSError as error:
            reasons.append(f"{error.filename or 'the cache'} cannot be written: {reason(error)}")
        except UsageError as error:
            reasons.append(str(error))
    raise UsageError(f"there is no place for compiled kernels: {'; '.join(reasons)}")


def _temporary() -> Path:
    """Code is loaded from here, so nobody else may be able to write it. Raises UsageError, OSError."""
    path = Path(tempfile.gettempdir()) / f"flashring.{os.getuid()}"
    path.mkdir(mode=0o700, exist_ok=True)
    status = path.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o077:
        raise UsageError(f"{path} is not this user's alone")
    return path / "numba"


def check_writable(file: Path) -> None:
    """Raise UsageError, before the work, where its result could not be written to `file` after it."""
    if not file.parent.is_dir():
        raise UsageError(f"{file} cannot be written: there is no directory {file.parent}")
    if not os.access(file.parent, os.W_OK | os.X_OK):
        raise UsageError(f"{file} cannot be written: the directory {file.parent} is not writable")
    if file.is_dir():
        raise UsageError(f"{file} cannot be written: it is a directory")
    if file.exists() and not os.access(file, os.W_OK):
        raise UsageError(f"{file} cannot be written: it is there and not writable")


def _listed_home() -> str:
    """The home that the system's list of users gives: HOME may be unset, or empty."""
    try:
        return pwd.getpwuid(os.getuid()).pw_dir
    except KeyError:
        raise UsageError("this user has no home directory: set HOME, or XDG_CACHE_HOME") from None
