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


def _listed_home() -> str:
    """The home that the system's list of users gives: HOME may be unset, or empty."""
    try:
        return pwd.getpwuid(os.getuid()).pw_dir
    except KeyError:
        raise UsageError("this user has no home directory: set HOME, or XDG_CACHE_HOME") from None
