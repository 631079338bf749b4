"""`python -m workers.probe FILE --codecs float16,q8,q4 --parts disk,memory`: one JSON object of rates.

FILE is on the disk that is meant, and is only read. Bytes and FLOP a second, seconds; `others` is the share
of the processors that other programs took meanwhile. It takes some seconds, and the first time as many more
as the kernels take to compile.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Final

import uvloop

from pipeline.cores import thread_count
from pipeline.ending import exit_status
from pipeline.ring.promptness import be_prompt
from storage.errors import StoreError
from workers.probe.others import Moment, share
from workers.probe.reads import BUFFER_BYTES, measure, new_pages

SIZES: Final = (1 << 10, 4 << 10, 16 << 10, 64 << 10, 256 << 10, 1 << 20)  # bytes of a read
SECONDS: Final = 0.2  # of each try
PASSES: Final = 3
ASSUMED: Final = 1e9  # bytes a second, to choose how many reads that is
FEWEST, MOST = 24, 8_000  # reads
ALONE: Final = 300  # reads, one after another
STREAMED: Final = 32 << 20  # bytes of destinations in turn: a ring streams through two halves of 16 MiB
DEPTH: Final = 128  # reads in flight, and at most as many bytes as the configuration's default
IN_FLIGHT: Final = 8 << 20


def disk(file: Path) -> dict[str, object]:
    """Of random reads: [bytes of one, bytes a second] by each size that the file is large enough for.

    And bytes a second of the longest reads in order, and the seconds of one read alone.
    """
    size = file.stat().st_size
    if size < SIZES[-1] * FEWEST:
        raise StoreError(f"{file} is too small for a probe of its disk")
    memory = new_pages(BUFFER_BYTES)
    uvloop.run(measure(file, SIZES[1], 1, DEPTH, FEWEST, memory=memory))  # the first reads find caches cold
    found: dict[int, list[float]] = {request: [] for request in SIZES}
    streams: list[float] = []
    longest = SIZES[-1]
    for _ in range(PASSES):  # in turn: a shared disk changes within seconds
        for request in SIZES:
            count = max(FEWEST, min(MOST, round(SECONDS * ASSUMED / request)))
            depth = max(1, min(DEPTH, IN_FLIGHT // request))
            done = uvloop.run(measure(file, request, 1, depth, count, memory=memory))
            found[request].append(float(done["bytes_per_second"]))
        done = uvloop.run(
            measure(
                file,
                longest,
                1,
                IN_FLIGHT // longest,
                round(SECONDS * ASSUMED / longest),
                sequential=True,
                buffers=STREAMED // longest,
                memory=memory,
            )
        )
        streams.append(float(done["bytes_per_second"]))
    alone = uvloop.run(measure(file, SIZES[1], 1, 1, ALONE, memory=memory))
    rates = [[request, statistics.median(several)] for request, several in found.items()]
    return {
        "rates": rates,
        "stream": statistics.median(streams),
        "latency": 1 / float(alone["reads_per_second"]),
    }


def memory(codecs: list[str], threads: int) -> dict[str, object]:
    """Of memory, products, launches and messages."""
    from workers.probe import hops
    from workers.probe import memory as rates

    kinds = {name: rates.products(name, threads) for name in codecs}
    first = codecs[0]
    launch = rates.launch(threads, first, kinds[first]["product"])
    return {
        "read": rates.plain(threads),
        "kinds": kinds,
        "launch": launch,
        "scoring": rates.scoring(),
        "arithmetic": rates.arithmetic(threads),
        "hop": hops.hop(lambda: time.sleep(0.002)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m workers.probe", description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--codecs", default="float16,bfloat16,q8,q4")
    parser.add_argument("--parts", default="disk,memory")
    parser.add_argument("--threads", type=int, default=0)
    given = parser.parse_args()
    found: dict[str, object] = {}
    parts = given.parts.split(",")
    before = Moment.now()
    if "disk" in parts:
        own = os.sched_getaffinity(0)
        be_prompt()  # as the prefetcher is
        found["disk"] = disk(given.file)
        os.sched_setaffinity(0, own)
    if "memory" in parts:
        found |= memory(given.codecs.split(","), thread_count(given.threads))
    print(json.dumps({**found, "others": share(before, Moment.now())}))


if __name__ == "__main__":
    sys.exit(exit_status(main))
