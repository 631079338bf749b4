"""The same checkpoint and tokens through other packages, in an environment of their own where they need one.

An environment is a directory `$FLASHRING_HOME/peers/NAME` made by `python -m venv`, or an interpreter named
on the command line; `docs/bench.md` has the commands. llama.cpp may also be installed beside us. The programs
stand in `workers/lab/peers/` and print one JSON object like our own.
"""

from __future__ import annotations

import contextlib
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from pipeline import directories
from pipeline.console import size
from pipeline.launch import module_environment
from pipeline.planner import devices
from pipeline.planner.budget import parse_budget
from pipeline.ring.plan import HOST
from storage.errors import DiskFull, UsageError
from storage.gguf.parts import is_gguf
from storage.tokenizer import load_tokenizer
from workers.lab.bench import children
from workers.lab.bench.children import Ran
from workers.lab.bench.job import BenchJob, first_tokens
from workers.lab.bench.rows import of_peer
from workers.lab.bench.series import Series

TOKENS = 4  # decoded by a peer: each takes seconds, and the first warms up


@dataclass(frozen=True, slots=True)
class Peer:
    """Another package, and what is peculiar to it."""

    module: str  # its program
    gguf: bool = False  # reads a GGUF file in the place of a checkpoint's directory
    package: str = ""  # that makes our own environment do
    shards: bool = False  # writes the model once more, layer by layer
    tokens: int | None = TOKENS  # decoded; None: all
    flags: tuple[str, ...] = ()  # of its program
    forced: bool = False  # it can be made to read a mixture's text token by token
    gpus: bool = False  # it computes on the bench's device, too


_LLAMA_CPP = "workers.lab.peers.run_llama_cpp"
PEERS = {
    "accelerate": Peer("workers.lab.peers.run_accelerate", gpus=True),
    "airllm": Peer("workers.lab.peers.run_airllm", shards=True),
    "llama.cpp": Peer(_LLAMA_CPP, gguf=True, package="xllamacpp", tokens=None, forced=True),
    "llama.cpp-direct": Peer(
        _LLAMA_CPP, gguf=True, package="xllamacpp", tokens=None, flags=("--direct",), forced=True
    ),
}


def interpreters(names: Sequence[str], given: Mapping[str, Path]) -> dict[str, Path]:
    """Each peer's Python. Raises UsageError for one that is not known or not installed."""
    found = {}
    for name in names:
        if name not in PEERS:
            raise UsageError(f"unknown peer {name!r}; known are {', '.join(PEERS)}")
        path = given.get(name) or directories.home() / "peers" / name / "bin" / "python"
        package = PEERS[name].package
        if name not in given and package and find_spec(package):
            path = Path(sys.executable)
        if not path.exists():
            raise UsageError(
                f"the peer {name} has no environment at {path}; docs/bench.md has the command that makes it"
            )
        found[name] = path
    return found


def check_readable(names: Sequence[str], checkpoint: Path) -> None:
    """Raises UsageError for a checkpoint that is not of a peer's kind."""
    for name in names:
        if PEERS[name].gguf != is_gguf(checkpoint):
            reads = "a GGUF file" if PEERS[name].gguf else "a checkpoint's directory"
            raise UsageError(f"the peer {name} reads {reads}, which {checkpoint} is not")


def check_space(names: Sequence[str], checkpoint: Path, work: Path) -> None:
    """Raises DiskFull before a peer writes what does not fit."""
    if not any(PEERS[name].shards for name in names):
        return
    needed = sum(file.stat().st_size for file in checkpoint.iterdir() if file.is_file())
    free = shutil.disk_usage(work).free
    if free < needed:
        raise DiskFull(f"{work} has {size(free)} free, and airllm writes {size(needed)} there")


def series(job: BenchJob, python: Mapping[str, Path], checkpoint: Path, work: Path) -> list[Series]:
    """One row a peer, under the cgroup that the rows at half memory have; `work` is there.

    Raises DiskFull, and UsageError for a checkpoint that a peer cannot read, or a GPU that it cannot use.
    """
    for name in python:
        if job.device not in HOST and not PEERS[name].gpus:
            raise UsageError(f"the peer {name} computes on the CPU here, not on {job.device}: leave it out")
    check_readable(list(python), checkpoint)
    check_space(list(python), checkpoint, work)
    return [_series(job, name, path, checkpoint, work) for name, path in python.items()]


def _series(job: BenchJob, name: str, python: Path, checkpoint: Path, work: Path) -> Series:
    limit = parse_budget(job.budget, job.store)
    environment = {**module_environment(), "HF_HUB_OFFLINE": "1"}
    peer, forced = PEERS[name], PEERS[name].forced and job.store.architecture.mixture
    line = [str(python), "-m", peer.module, str(checkpoint), "--limit", str(limit), *peer.flags]
    line += ["--prompt-tokens", str(job.prompt_tokens), "--threads", str(job.threads)]
    line += ["--forced"] if forced else []
    if job.device not in HOST:
        room = devices.limit(job.store, job.resolved())
        line += ["--device", job.device, "--device-limit", str(room)]
    count = peer.tokens or job.count

    def run() -> Ran:
        before = load_tokenizer(job.store).encode(job.prompt).ids if forced else []
        with first_tokens(job.tokens, count, before) as tokens, scratch(work / f"peer-{name}") as directory:
            return children.run(
                [*line, "--tokens", str(tokens), "--scratch", str(directory)], limit, environment
            )

    return Series(name, run, partial(of_peer, name, budget=limit), budget_bytes=limit)


@contextlib.contextmanager
def scratch(directory: Path) -> Iterator[Path]:
    """A directory that is gone afterwards."""
    directory.mkdir(parents=True, exist_ok=True)
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)
