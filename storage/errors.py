"""Every way in which something on disk can be wrong.

FlashringError                 anything this project raises on purpose: one clear sentence
├── UsageError                 the caller asked for something impossible (exit code 2)
│   ├── ConfigError            unknown key, value out of range
│   └── UnsupportedModel       architecture, activation, dtype or option that no family here has
├── CheckpointError            a Hugging Face checkpoint that cannot be read
├── StoreError                 a directory that is not a usable store
│   ├── StoreMissing           nothing there, or nothing of this kind: a wrong path (exit code 2)
│   ├── StoreIncomplete        conversion was interrupted, or was started with other parameters
│   └── StoreCorrupt           bytes that do not match their checksum or size
├── BudgetError                memory budget too small (exit code 2)
├── DiskFull                   no space left while writing
└── RingError                  a worker died, timed out or reported a failure
    └── DamagedStore           a worker met bytes of the store that are not what was written
"""

from __future__ import annotations


class FlashringError(Exception):
    """Base of all errors raised on purpose; `str(error)` is one clear sentence."""

    exit_code = 1


class UsageError(FlashringError):
    exit_code = 2


class ConfigError(UsageError):
    pass


class UnsupportedModel(UsageError):
    pass


class CheckpointError(FlashringError):
    pass


class StoreError(FlashringError):
    pass


class StoreMissing(StoreError):
    exit_code = 2


class StoreIncomplete(StoreError):
    pass


class StoreCorrupt(StoreError):
    pass


class BudgetError(FlashringError):
    exit_code = 2


class DiskFull(FlashringError):
    pass


class RingError(FlashringError):
    pass


class DamagedStore(RingError):
    pass


def reason(error: Exception) -> str:
    """What an exception says, for a sentence of ours: an OSError's without its number and path."""
    return getattr(error, "strerror", None) or str(error)
