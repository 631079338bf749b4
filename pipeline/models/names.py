"""Which model a name means.

A name is, in this order: a preset (a file of `configs/`), a directory (store or checkpoint), a GGUF file, or
a Hugging Face id (`org/name`).
"""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from pipeline.config import NOTHING, Config, Values
from pipeline.launch import ROOT
from pipeline.models import builtin
from pipeline.models.hub import HUB_ID
from pipeline.models.stores import Source
from storage.checkpoint import CONFIG
from storage.errors import CheckpointError, UsageError
from storage.gguf.parts import is_gguf
from storage.manifest import MANIFEST
from storage.store import unfinished


def presets() -> dict[str, Path]:
    """The shipped configurations by name."""
    for directory in (ROOT / "configs", Path(sys.prefix) / "share" / "flashring" / "configs"):
        if (directory / f"{builtin.NAME}.toml").is_file():  # another project may have a `configs`, too
            return {file.stem: file for file in sorted(directory.glob("*.toml"))}
    return {}


def configure(
    model: str, file: Path | None, settings: Iterable[str], values: Values = NOTHING
) -> tuple[Source, Config]:
    """What `--model`, `--config`, `--set` and the options that have a key of their own mean together.

    The preset's values come first, then the file's, then the settings, then `values`. Raises UsageError.
    """
    settings = list(settings)
    known = presets()
    config = Config.load(file, settings, values=values)
    if not model and not config.model.checkpoint and not config.model.store:
        model = builtin.NAME
    if model in known:
        config = Config.load(file, settings, known[model], values)
    source = find_source(model) if model and model not in known else _configured_source(config, model)
    return replace(source, bits=config.model.bits), config


def find_source(model: str) -> Source:
    """The source that a name means. Raises UsageError, with the nearest names, for none."""
    known = presets()
    if model in known:
        return _configured_source(Config.load(known[model]), model)
    path = _absolute(model)
    if path.is_dir() or _was_interrupted(path):
        return _directory_source(path)
    if is_gguf(path):
        return _gguf_source(path)
    if path.is_file():
        raise UsageError(f"{model} is a file, but no .gguf: name a checkpoint's directory, or a GGUF file")
    if HUB_ID.fullmatch(model):
        return Source(name=model.rpartition("/")[2], hub_id=model)
    if "/" in model or model.startswith("."):
        raise UsageError(f"there is no directory {model}")
    near = difflib.get_close_matches(model.lower(), known, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else f"known are {', '.join(known)}"
    raise UsageError(f"unknown model {model!r}; {hint}")


def _configured_source(config: Config, preset: str) -> Source:
    """The source that a configuration's `model` section names."""
    if config.model.store:
        return _directory_source(_absolute(config.model.store))
    checkpoint = config.model.checkpoint
    if checkpoint == builtin.NAME:
        if not (builtin.CHECKPOINT / CONFIG).is_file():
            raise CheckpointError(_missing(builtin.CHECKPOINT))
        return Source(name=builtin.NAME, directory=builtin.CHECKPOINT)
    if checkpoint == builtin.MIXTURE:
        if not builtin.MIXTURE_FILE.is_file():
            raise CheckpointError(_missing(builtin.MIXTURE_FILE))
        return Source(name=builtin.MIXTURE, file=builtin.MIXTURE_FILE)
    path = _absolute(checkpoint)
    if path.is_dir():
        return _directory_source(path)
    if is_gguf(path):
        return _gguf_source(path)
    if HUB_ID.fullmatch(checkpoint):
        return Source(name=preset or checkpoint.rpartition("/")[2], hub_id=checkpoint)
    raise UsageError(f"model.checkpoint {checkpoint!r} is no directory, GGUF file or Hugging Face id")


def _missing(place: Path) -> str:
    return (
        f"the built-in model is missing from {place}; install flashring again, or name another model "
        "with --model"
    )


def _gguf_source(path: Path) -> Source:
    if not path.is_file():
        raise UsageError(f"there is no file {path}")
    return Source(name=path.stem, file=path.resolve())


def _absolute(path: str) -> Path:
    """So that `.` has a name and a parent, too."""
    return Path(os.path.abspath(Path(path).expanduser()))


def _was_interrupted(path: Path) -> bool:
    return os.path.isdir(unfinished(path))  # also where that name is too long to be one


def _directory_source(path: Path) -> Source:
    if (path / MANIFEST).is_file() or _was_interrupted(path):
        return Source(name=path.name, store=path)
    if (path / CONFIG).is_file():
        return Source(name=path.resolve().name, directory=path.resolve())
    raise UsageError(
        f"{path} is neither a store ({MANIFEST}) nor a Hugging Face checkpoint ({CONFIG})"
        if path.is_dir()
        else f"there is no directory {path}"
    )
