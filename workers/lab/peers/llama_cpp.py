"""llama.cpp by the package xllamacpp, on the CPU, one request at a time: for the programs beside this file.

It gets token ids, so that no tokenizer comes between.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

REPACKED = 2  # times the file's size: what llama.cpp takes with the copy of it that its kernels like better
ROOM = 1 << 30  # bytes for all else


class LlamaCpp:
    """A GGUF file, loaded. A program that made one ends with `leave`."""

    def __init__(
        self, file: Path, context: int, threads: int, limit: int | None = None, direct: bool = False
    ) -> None:
        """`threads`, 0: one a core. Under a `limit` of bytes weights are copied only where that has room.

        The file is mapped, or read past the page cache where `direct` is wanted: then all of it is in memory.
        """
        import xllamacpp

        params = xllamacpp.CommonParams()
        params.model.path = str(file)
        params.n_ctx = context
        params.n_parallel = 1  # the context is not divided
        params.n_gpu_layers = 0
        params.cpuparams.n_threads = threads or len(os.sched_getaffinity(0))
        params.no_extra_bufts = limit is not None and limit < REPACKED * file.stat().st_size + ROOM
        modes = xllamacpp.llama_load_mode
        params.load_mode = modes.LLAMA_LOAD_MODE_DIRECT_IO if direct else modes.LLAMA_LOAD_MODE_MMAP
        params.warmup = False
        params.verbosity = 1  # errors
        self.version = version("xllamacpp") + (" without repacking" if params.no_extra_bufts else "")
        self._server = xllamacpp.Server(params)

    def complete(
        self,
        prompt: Sequence[int],
        count: int,
        tell: Callable[[dict[str, Any]], None] | None = None,
        **more: Any,
    ) -> Any:
        """Continue greedily by `count` tokens at most: the answer of the completions' end point.

        With `tell` there is none: it gets the parts of a streamed answer as they come.
        """
        body = {"prompt": list(prompt), "max_tokens": count, "temperature": 0, "cache_prompt": False, **more}
        if tell is None:
            return self._server.handle_completions(body)
        return self._server.handle_completions({**body, "stream": True}, tell)


def leave(result: Any) -> None:
    """Print the result as JSON and end at once: the server's threads do not end by themselves."""
    print(json.dumps(result), flush=True)
    os._exit(0)
