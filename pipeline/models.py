"""Which model a name means, where its checkpoint comes from, and the cache of converted stores.

A name is, in this order: a preset (a file of `configs/`), a directory (store or checkpoint), or a
Hugging Face id (`org/name`). Stores of checkpoints are made on first use, in `stores` under
`directories.home()`.
"""

from __future__ import annotations

import contextlib
import difflib
import errno
import fcntl
import fnmatch
import os
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import xxhash

from pipeline import directories
from pipeline.config import NOTHING, Config, Model, Values
from pipeline.console import say
from pipeline.launch import ROOT
from storage import files
from storage.errors import CheckpointError, StoreError, UsageError, reason
from storage.manifest import MANIFEST
from storage.store import Store, unfinished

BUILTIN = "builtin"
BUILTIN_CHECKPOINT = ROOT / "storage" / "builtin"
BUILTIN_PREDICTORS = "predictors.safetensors"  # beside the checkpoint; copied into its store
CONFIG = "config.json"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# What a conversion reads: configuration and tokenizer, then the weights in one of two forms.
SMALL_FILES = ("*.json", "merges.txt", "chat_template.jinja")
SAFETENSORS, TORCH = "*.safetensors", "pytorch_model*.bin"
FINGERPRINTED = {".json", ".jinja", ".safetensors", ".bin", ".txt"}
# A download that this machine refuses to keep; what the network refuses has other numbers.
UNWRITABLE = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS}


def presets() -> dict[str, Path]:
    """The shipped configurations by name."""
    for directory in (ROOT / "configs", Path(sys.prefix) / "share" / "flashring" / "configs"):
        if (directory / f"{BUILTIN}.toml").is_file():  # another project may have a `configs`, too
            return {file.stem: file for file in sorted(directory.glob("*.toml"))}
    return {}


@dataclass(frozen=True, slots=True)
class Source:
    """Where a model is: exactly one of store, directory and hub id is set."""

    name: str  # for people
    store: Path | None = None
    directory: Path | None = None  # of a checkpoint
    hub_id: str = ""

    def checkpoint(self) -> Path:
        """The checkpoint's directory, downloaded if need be."""
        if self.directory is not None:
            return self.directory
        if self.hub_id:
            return download(self.hub_id)
        raise UsageError(f"{self.store} is a store already")

    def open_store(self) -> Store:
        """The store, converted on first use. Later calls open it at once, without the network."""
        if self.store is not None:
            return Store.open(self.store)
        path = self.cached_store()
        store = Store.open(path) if (path / MANIFEST).is_file() else self._convert(path)
        if self.directory == BUILTIN_CHECKPOINT:
            install_predictors(store)
        return store

    def cached_store(self) -> Path:
        """Where the converted store is, or will be."""
        if self.hub_id:
            key = self.hub_id.replace("/", "--")
        else:
            assert self.directory is not None
            key = f"{self.name}-{_fingerprint(self.directory)}"
        return directories.home() / "stores" / key

    def _convert(self, path: Path) -> Store:
        checkpoint = self.checkpoint()
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(path.with_name(path.name + ".lock")):
            if not (path / MANIFEST).is_file():  # another process may have made it meanwhile
                say(f"converting {self.name} for flash into {path} (once)")
                convert(checkpoint, path, name=self.name)
        return Store.open(path)


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
        model = BUILTIN
    if model in known:
        config = Config.load(file, settings, known[model], values)
    if model and model not in known:
        return find_source(model), config
    return _configured_source(config, model), config


def find_source(model: str) -> Source:
    """The source that a name means. Raises UsageError, with the nearest names, for none."""
    known = presets()
    if model in known:
        return _configured_source(Config.load(known[model]), model)
    path = _absolute(model)
    if path.is_dir() or _was_interrupted(path):
        return _directory_source(path)
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
    if checkpoint == BUILTIN:
        if not (BUILTIN_CHECKPOINT / CONFIG).is_file():
            raise CheckpointError(
                f"the built-in model is missing from {BUILTIN_CHECKPOINT}; install flashring again, "
                "or name another model with --model"
            )
        return Source(name=BUILTIN, directory=BUILTIN_CHECKPOINT)
    path = _absolute(checkpoint)
    if path.is_dir():
        return _directory_source(path)
    if HUB_ID.fullmatch(checkpoint):
        return Source(name=preset or checkpoint.rpartition("/")[2], hub_id=checkpoint)
    raise UsageError(f"model.checkpoint {checkpoint!r} is no directory and no Hugging Face id")


def _absolute(path: str) -> Path:
    """So that `.` has a name and a parent, too."""
    return Path(os.path.abspath(Path(path).expanduser()))


def _was_interrupted(path: Path) -> bool:
    return unfinished(path).is_dir()


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


def _fingerprint(directory: Path) -> str:
    """Changes when the checkpoint does.

    By content for small files, so that the built-in model is known whatever its times are; by
    place, size and time for shards, which are too large to hash at every start.
    """
    digest = xxhash.xxh3_64()
    for file in sorted(directory.iterdir()):
        if file.suffix not in FINGERPRINTED or file.name == BUILTIN_PREDICTORS:
            continue
        digest.update(file.name.encode())
        status = file.stat()
        if status.st_size <= 64 << 20:
            digest.update(file.read_bytes())
        else:
            digest.update(f"{file.resolve()}\0{status.st_size}\0{status.st_mtime_ns}".encode())
    return digest.hexdigest()


def convert(
    checkpoint: Path, store: Path, *, name: str, alignment: int = 512, order: Path | None = None
) -> None:
    """Convert with a progress bar; `order`: a `.npy` of neurons by position."""
    from pipeline.progress import Progress
    from storage.convert import convert as convert_checkpoint
    from storage.convert import read_order

    neurons = read_order(order) if order else None

    with Progress(f"converting {name}") as progress:
        convert_checkpoint(
            checkpoint, store, name=name, alignment=alignment, order=neurons, progress=progress
        )


def install_predictors(store: Store) -> None:
    """Copy the built-in model's predictors into its store, when they are new."""
    source = BUILTIN_CHECKPOINT / BUILTIN_PREDICTORS
    target = store.predictors(Model().predictor)
    if not source.is_file():
        return
    data = source.read_bytes()
    if target.is_file() and target.read_bytes() == data:
        return
    target.parent.mkdir(exist_ok=True)
    try:
        files.write_whole(target, data, shared=True)
    except OSError as error:
        raise StoreError(f"{target} cannot be written: {reason(error)}") from error


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One conversion at a time; the lock goes with the process that holds it."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("waiting for another process that converts the same model")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def download(hub_id: str) -> Path:
    """The checkpoint's directory in the Hugging Face cache, fetched and resumed as needed.

    HF_HOME and HF_HUB_OFFLINE are huggingface_hub's own and honoured by it. Raises CheckpointError
    with the commands that fetch the checkpoint where there is no network, and with what this machine
    says where it cannot be kept, and UsageError for an id that the hub does not know.
    """
    from huggingface_hub import HfApi, errors, snapshot_download

    try:
        # One request without retries, so that a missing network is noticed at once.
        siblings = HfApi().model_info(hub_id, timeout=10).siblings or ()
        patterns = _patterns([sibling.rfilename for sibling in siblings])
        say(f"fetching {hub_id} from the Hugging Face hub (once)")
        return Path(snapshot_download(hub_id, allow_patterns=patterns))
    except (errors.GatedRepoError, errors.RepositoryNotFoundError, errors.HFValidationError) as error:
        raise UsageError(
            f"the Hugging Face hub has no model {hub_id} that you may read: check the name, "
            "or log in with `hf auth login`"
        ) from error
    except Exception as error:
        if isinstance(error, OSError) and error.errno in UNWRITABLE:
            raise CheckpointError(
                f"the checkpoint {hub_id} cannot be fetched into the Hugging Face cache, which HF_HOME "
                f"moves: {reason(error)}"
            ) from error
        if not _is_unreachable(error):
            raise
        return _downloaded_before(hub_id, error)


def _patterns(files: list[str]) -> list[str]:
    """What to fetch of a repository: the weights in one form, safetensors if it has them."""
    safetensors = any(fnmatch.fnmatch(file, SAFETENSORS) for file in files)
    return [*SMALL_FILES, SAFETENSORS if safetensors else TORCH]


def _is_unreachable(error: Exception) -> bool:
    """Whether the hub could not be asked, or not to the end.

    Connection errors belong to the HTTP client, whose package differs between versions of the hub's.
    """
    return isinstance(error, OSError) or type(error).__module__.startswith("httpx")


def _downloaded_before(hub_id: str, reason: Exception) -> Path:
    """A checkpoint that an earlier download left whole. Raises CheckpointError."""
    from huggingface_hub import errors, snapshot_download

    with contextlib.suppress(OSError, errors.LocalEntryNotFoundError):
        path = Path(snapshot_download(hub_id, local_files_only=True))
        if (path / CONFIG).is_file() and (any(path.glob(SAFETENSORS)) or any(path.glob(TORCH))):
            return path
    local = hub_id.rpartition("/")[2]
    raise CheckpointError(
        f"the checkpoint {hub_id} is not on this machine and the Hugging Face hub cannot be reached; where "
        f"there is a network, fetch it with `hf download {hub_id} --local-dir {local}`, then run again with "
        f"`--model ./{local}`"
    ) from reason
