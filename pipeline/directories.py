"""Where this program keeps what it makes for a user."""

from __future__ import annotations

import os
import pwd
from pathlib import Path

from storage.errors import UsageError


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
