"""What the peers' programs share: arguments, timing, and the JSON object that `workers.lab.bench` reads."""

from __future__ import annotations

import argparse
import json
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

RSS_UNIT = 1024  # bytes of `ru_maxrss` on Linux


def arguments(description: str | None, **flags: str) -> argparse.Namespace:
    """checkpoint, tokens, prompt_tokens, scratch, limit, threads, device, device_limit, and flags by name."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--tokens", type=Path, required=True, help="file of token ids to decode")
    parser.add_argument("--prompt-tokens", type=int, default=1, help="length of the prompt before them")
    parser.add_argument("--scratch", type=Path, required=True, help="directory for whatever is written")
    parser.add_argument("--limit", type=int, required=True, help="bytes of memory")
    parser.add_argument("--threads", type=int, default=0, help="0: as many as the package likes")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or mps")
    parser.add_argument("--device-limit", type=int, default=0, help="bytes of its memory")
    for name, told in flags.items():
        parser.add_argument(f"--{name}", action="store_true", help=told)
    return parser.parse_args()


def read_bytes() -> int:
    """What this process has made the disk read so far."""
    for line in Path("/proc/self/io").read_text().splitlines():
        if line.startswith("read_bytes:"):
            return int(line.split()[1])
    return 0


def report(tokens: list[int], decode: Callable[[int, int], None], version: str) -> None:
    """Time `decode(index, token)` for each token, the first as a warm-up, and print the result."""
    seconds: list[float] = []
    before = 0
    for index, token in enumerate(tokens):
        started = time.perf_counter()
        decode(index, token)
        if index == 0:
            before = read_bytes()
        else:
            seconds.append(time.perf_counter() - started)
    print(json.dumps(measured(seconds, (read_bytes() - before) / max(1, len(seconds)), version)))


def measured(seconds: list[float], bytes_per_token: float, version: str) -> dict[str, Any]:
    """What a peer's program prints; `seconds` of each token after the first."""
    return {
        "token_seconds": seconds,
        "bytes_per_token": bytes_per_token,
        "memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * RSS_UNIT,
        "version": version,
    }
