"""Which kind of origin a path is."""

from __future__ import annotations

from pathlib import Path

from storage.checkpoint import Checkpoint
from storage.codecs import FLOATS
from storage.errors import UsageError
from storage.families.registry import FAMILIES
from storage.gguf.parts import is_gguf
from storage.origin import Origin


def open_origin(path: Path, dtype: str | None = None, bits: int | None = None) -> Origin:
    """A GGUF file, or a checkpoint's directory.

    `dtype` is what a GGUF file's matrices are widened to, and so does `bits` 16, to what loses least;
    otherwise they stay as they are.

    Raises CheckpointError or UnsupportedModel for what is there, UsageError for a dtype that cannot be.
    """
    if dtype is not None and dtype not in FLOATS:
        raise UsageError(f"the dtype must be one of {', '.join(FLOATS)}, not {dtype!r}")
    if is_gguf(path):
        from storage.gguf.file import GgufFile

        return GgufFile.open(path, dtype, keep=dtype is None and bits != 16)
    if dtype is not None:
        raise UsageError(f"{path} is no GGUF file: its tensors keep their own dtype")
    checkpoint = Checkpoint.open(path)
    kind = checkpoint.config.get("model_type")
    family = FAMILIES.get(kind) if isinstance(kind, str) else None
    if family is None or family.published is None:
        return checkpoint
    return family.published(checkpoint, bits != 16)
