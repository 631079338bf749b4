"""What a token costs where every neuron is needed: why it is, and how fast the disk delivers."""

from __future__ import annotations

import mmap
import os
import time

from pipeline.config import Config
from pipeline.planner.resolve import predictor_bytes
from storage.files import open_direct
from storage.manifest import BUNDLES
from storage.store import Store

PROBE_SECONDS = 0.15
PROBE_READ = 4 << 20  # bytes; the kernel keeps several requests of one such read in flight


def why_dense(store: Store, config: Config) -> str:
    """The reason for kind `all`, to stand after the model's name."""
    if not store.architecture.sparse:
        return f"is not sparse ({store.architecture.activation})"
    if predictor_bytes(store, config):
        return "runs with every neuron, as asked"
    return "runs without predictors (train-predictor makes them)"


def probe_rate(store: Store) -> float:
    """Bytes a second that the store's disk delivers in large sequential reads, from a short try."""
    total = store.layout.total_bytes
    descriptor = open_direct(store.path / BUNDLES)
    done = position = 0
    started = time.perf_counter()
    try:
        with mmap.mmap(-1, PROBE_READ) as buffer:  # page-aligned, as direct I/O asks
            while (elapsed := time.perf_counter() - started) < PROBE_SECONDS:
                done += os.preadv(descriptor, [buffer], position)
                position += PROBE_READ
                if position >= total:
                    position = 0
    finally:
        os.close(descriptor)
    return max(1.0, done / elapsed)
