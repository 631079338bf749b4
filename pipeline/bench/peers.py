"""The same checkpoint and tokens through other packages, each in an environment of its own.

An environment is a directory `$FLASHRING_HOME/peers/NAME` made by `python -m venv`, or an interpreter named
on the command line; `docs/bench.md` has the commands. The programs stand in `workers/peers/` and print one
JSON object like our own.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from pipeline import directories, planner
from pipeline.bench import children
from pipeline.bench.children import ChildFailed
from pipeline.bench.job import Job, first_tokens
from pipeline.bench.rows import Row, of_peer
from pipeline.console import size
from pipeline.launch import module_environment
from storage.errors import DiskFull, UsageError

PEERS = ("accelerate", "airllm")
SHARDS_AGAIN = ("airllm",)  # write the model once more, layer by layer
TOKENS = 4  # decoded by a peer: each takes seconds, and the first warms up


def interpreters(names: Sequence[str], given: Mapping[str, Path]) -> dict[str, Path]:
    """Each peer's Python. Raises UsageError for one that is not known or not installed."""
    found = {}
    for name in names:
        if name not in PEERS:
            raise UsageError(f"unknown peer {name!r}; known are {', '.join(PEERS)}")
        path = given.get(name) or directories.home() / "peers" / name / "bin" / "python"
        if not path.exists():
            raise UsageError(
                f"the peer {name} has no environment at {path}; docs/bench.md has the command that makes it"
            )
        found[name] = path
    return found


def check_space(names: Sequence[str], checkpoint: Path, work: Path) -> None:
    """Raises DiskFull before a peer writes what does not fit."""
    if not set(names) & set(SHARDS_AGAIN):
        return
    needed = sum(file.stat().st_size for file in checkpoint.iterdir() if file.is_file())
    free = shutil.disk_usage(work).free
    if free < needed:
        raise DiskFull(f"{work} has {size(free)} free, and airllm writes {size(needed)} there")


def measure(job: Job, python: Mapping[str, Path], checkpoint: Path, work: Path) -> list[Row]:
    """One row a peer, under the cgroup that the rows at half memory had."""
    return [_measure(job, name, path, checkpoint, work) for name, path in python.items()]


def _measure(job: Job, name: str, python: Path, checkpoint: Path, work: Path) -> Row:
    job.say(f"measuring {name}")
    limit = planner.parse_budget(job.budget, job.store)
    scratch = work / f"peer-{name}"
    scratch.mkdir(parents=True, exist_ok=True)
    environment = {**module_environment(), "HF_HUB_OFFLINE": "1"}
    try:
        with first_tokens(job.tokens, TOKENS) as tokens:
            line = [str(python), "-m", f"workers.peers.run_{name}", str(checkpoint)]
            line += ["--tokens", str(tokens), "--prompt-tokens", str(job.prompt_tokens)]
            line += ["--scratch", str(scratch), "--limit", str(limit)]
            runs = [children.run(line, limit, environment) for _ in range(job.repeats)]
    except ChildFailed as error:
        return Row(name=name, error=str(error), budget_bytes=limit)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return of_peer(name, runs, limit)
