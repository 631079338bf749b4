"""What a pass has found so far, on disk: an interrupted measurement goes on at the layer where it was.

A stage is one pass of a text through all layers. It keeps the residual streams in front of the next layer,
and notes, which are plain values of JSON: what was seen of the layers behind. Without a directory nothing is
written, and a stage begins at the first layer.
"""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import torch
import xxhash
from torch import Tensor

from storage.files import replacing

EVERY = 20.0  # seconds between two states

Streams: TypeAlias = dict[int, tuple[Tensor, Tensor | None]]  # of each variant, as passes have them


@dataclass(slots=True)
class Stage:
    """One pass. `notes` belong to whoever looks on; they are those of an earlier run where it goes on."""

    path: Path | None = None
    key: str = ""
    notes: list[Any] = field(default_factory=list)
    _saved: float = field(default_factory=time.monotonic)

    def resume(self, about: str) -> tuple[int, Streams]:
        """The next layer and the streams in front of it, of the same pass; (0, {}) where there is none.

        `about` is whatever decides the pass: tokens, variants, weights.
        """
        self.key = xxhash.xxh3_128_hexdigest(about.encode())
        if self.path is None or not self.path.is_file():
            return 0, {}
        try:
            found = torch.load(self.path, weights_only=True)
        except (OSError, RuntimeError, EOFError, ValueError):
            return 0, {}
        if found["key"] != self.key:
            return 0, {}
        self.notes[:] = found["notes"]
        return int(found["next"]), found["streams"]

    def keep(self, following: int, streams: Streams, last: bool) -> None:
        """Once in a while, and at the end."""
        if self.path is None or (not last and time.monotonic() - self._saved < EVERY):
            return
        self.path.parent.mkdir(exist_ok=True)
        with replacing(self.path) as file:
            torch.save({"key": self.key, "next": following, "streams": streams, "notes": self.notes}, file)
        self._saved = time.monotonic()


@dataclass(frozen=True, slots=True)
class Journal:
    """The stages of one measurement."""

    directory: Path | None = None

    def stage(self, name: str) -> Stage:
        return Stage(None if self.directory is None else self.directory / f"{name}.pt")

    def close(self) -> None:
        """Remove what was kept: it is done."""
        if self.directory is not None:
            shutil.rmtree(self.directory, ignore_errors=True)
