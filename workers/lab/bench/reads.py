"""`python -m workers.lab.bench.reads FILE --bytes 16384 --readers 1 --depth 128`: random reads of one size.

Prints one JSON object. `workers/probe/reads.py` reads, by the prefetcher's own code.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import uvloop

from pipeline.ending import exit_status
from pipeline.ring.promptness import be_prompt
from storage.errors import UsageError
from workers.probe.reads import measure


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m workers.lab.bench.reads", description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--bytes", type=int, default=16384, help="of one read")
    parser.add_argument("--readers", type=int, default=1)
    parser.add_argument("--depth", type=int, default=128, help="of each reader")
    parser.add_argument("--count", type=int, default=40_000, help="reads")
    parser.add_argument("--backend", choices=("auto", "io_uring", "threads", "aiofiles"), default="auto")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--part", type=int, default=0, help="reads asked for together; 0: all")
    parser.add_argument("--ahead", type=int, default=2, help="parts asked for at a time")
    parser.add_argument("--buffers", type=int, default=0, help="that reads fill in turn; 0: 64 MiB of them")
    parser.add_argument("--sequential", action="store_true")
    parser.add_argument("--cached", action="store_true", help="through the page cache")
    given = parser.parse_args()
    for name in ("bytes", "readers", "depth", "count", "ahead"):
        if getattr(given, name) < 1:
            raise UsageError(f"--{name} must be at least 1")
    if given.buffers and given.buffers < given.readers * given.depth:
        raise UsageError("--buffers must be at least as many as the reads in flight")
    be_prompt()  # as the worker is
    result = uvloop.run(
        measure(
            given.file,
            given.bytes,
            given.readers,
            given.depth,
            given.count,
            given.backend,
            given.seed,
            given.part,
            given.ahead,
            given.sequential,
            not given.cached,
            given.buffers,
        )
    )
    print(json.dumps(result))


if __name__ == "__main__":
    sys.exit(exit_status(main))
