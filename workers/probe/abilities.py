"""`python -m workers.probe.abilities DIRECTORY`: what the workers find here, as one JSON object.

DIRECTORY is where stores will lie; a small file is written there, and is gone afterwards.
"""

from __future__ import annotations

import asyncio
import json
import platform
import sys
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any, Final

import numpy as np

from pipeline.ending import exit_status

BLOCK: Final = 4096  # bytes
REGISTERED: Final = 64 << 20  # bytes that are tried
# What LLVM calls them, and people.
FEATURES: Final = {
    "avx2": "AVX2",
    "f16c": "F16C",
    "avx512f": "AVX-512",
    "avx512vnni": "AVX-512 VNNI",
    "avxvnni": "AVX VNNI",
    "avx512bf16": "bf16",
    "amx-int8": "AMX int8",
    "amx-bf16": "AMX bf16",
    "neon": "NEON",
    "dotprod": "NEON dot products",
    "bf16": "NEON bf16",
    "sve": "SVE",
}


def reads(directory: Path) -> dict[str, Any]:
    """Of the prefetcher's ways to read a file there: what is in the way of each; empty: nothing."""
    from workers.prefetcher.backend import BackendUnavailable
    from workers.prefetcher.bundle_file import BundleFile, direct_alignment
    from workers.prefetcher.io_uring import IoUring

    async def ring(file: BundleFile) -> tuple[str, str]:
        try:
            queue = IoUring(file, 8)
        except BackendUnavailable as error:
            return str(error), ""
        queue.on_completed(lambda _: None)
        refusal = queue.register(np.zeros(REGISTERED, np.uint8))
        await queue.close()
        return "", refusal

    with NamedTemporaryFile(dir=directory, prefix=".flashring-doctor-") as made:
        made.write(bytes(4 * BLOCK))
        made.flush()
        with BundleFile.open(Path(made.name), BLOCK) as file:
            alignment = direct_alignment(file.descriptor)
            obstacle, refusal = asyncio.run(ring(file))
            return {
                "io_uring": obstacle,
                "registered": refusal,
                "registered_bytes": REGISTERED,
                "direct": file.note,
                "alignment": alignment or 0,
            }


def kernels() -> dict[str, Any]:
    """Whether they compile, or are compiled, and what they run on."""
    from storage.codecs import FLOAT16
    from storage.layout import Rows
    from workers import kernels as compiled
    from workers.kernels.processor import features

    there = features()
    try:
        rows = Rows.of_matrix(np.zeros((4, 128), np.uint16), FLOAT16)
        compiled.matvec(rows, np.zeros(128, np.float32), 1)
        failed = ""
    except Exception as error:  # whatever a compiler says
        failed = f"they do not compile: {error!s:.200}"
    return {
        "features": [name for key, name in FEATURES.items() if key in there],
        "machine": platform.machine(),
        "compiled": failed,
        "kernels": "" if failed else compiled.notes().removeprefix("kernels: "),
    }


def main() -> None:
    print(json.dumps({**reads(Path(sys.argv[1])), **kernels()}))


if __name__ == "__main__":
    sys.exit(exit_status(main))
