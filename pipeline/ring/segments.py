"""Shared memory: nameless segments, made by the supervisor and inherited by the workers.

A segment is a memfd (elsewhere an unlinked temporary file): it has no name to leak, and it goes
with the last process that holds it. Every row has one writer and is not written again before its
reader is done with it, because rows are per layer and a layer has one set in flight.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import tempfile
from dataclasses import dataclass
from math import prod

import numpy as np
import numpy.typing as npt

from pipeline.ring.plan import Plan

SHARED_MEMORY = "/dev/shm"  # a file system in memory
ID, SLOT = 0, 1  # the two columns of the tables of wanted neurons and of reads


@dataclass(frozen=True, slots=True)
class Segments:
    """Views on the shared memory of one ring."""

    bundles: npt.NDArray[np.uint8]  # [slots of all layers + 2 · staging, stride]; prefetcher → compute
    hidden: npt.NDArray[
        np.float32
    ]  # [1 + layers, hidden_rows, d_model], row 0: the embedding; compute → predictor
    # The tables are [layers, 2, units of the layer that has most].
    predicted: npt.NDArray[np.int32]  # ids, row 1: of guesses; predictor → cache
    wanted: npt.NDArray[np.int32]  # ID and SLOT of every part in turn; cache → compute
    reads: npt.NDArray[np.int32]  # ID and SLOT to read; cache → prefetcher


def _shapes(plan: Plan) -> dict[str, tuple[tuple[int, ...], type[np.generic]]]:
    per_layer = (plan.layers, 2, plan.most_units)
    return {
        "bundles": ((plan.total_slots + 2 * plan.staging, plan.stride), np.uint8),
        "hidden": ((1 + plan.layers, plan.hidden_rows, plan.d_model), np.float32),
        "predicted": (per_layer, np.int32),
        "wanted": (per_layer, np.int32),
        "reads": (per_layer, np.int32),
    }


def sizes(plan: Plan) -> dict[str, int]:
    """Bytes of each segment."""
    return {name: prod(shape) * np.dtype(kind).itemsize for name, (shape, kind) in _shapes(plan).items()}


def create(plan: Plan) -> dict[str, int]:
    """Make all segments; returns a file descriptor for each name, owned by the caller.

    Raises OSError where there are no descriptors left, or for a size beyond the system's limits. A memfd is
    not reserved: a page is taken when it is first written, or registered for reads.
    """
    descriptors: dict[str, int] = {}
    try:
        for name, size in sizes(plan).items():
            descriptors[name] = _nameless(f"flashring-{name}", size)
    except OSError:
        for descriptor in descriptors.values():
            os.close(descriptor)
        raise
    return descriptors


def _nameless(label: str, size: int) -> int:
    """A memfd; where the system forbids it, a file without a name, in shared memory or on disk."""
    try:
        descriptor = os.memfd_create(label)
    except OSError as error:
        if error.errno not in {errno.ENOSYS, errno.EPERM, errno.EACCES}:
            raise
        return _unnamed_file(size)
    try:
        os.ftruncate(descriptor, size)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _unnamed_file(size: int) -> int:
    """On the first file system with the room, and reserved: who writes a page that is not there is killed."""
    if os.access(SHARED_MEMORY, os.W_OK):
        with contextlib.suppress(OSError):
            return _reserved(SHARED_MEMORY, size)
    return _reserved(None, size)


def _reserved(place: str | None, size: int) -> int:
    with tempfile.TemporaryFile(dir=place) as file:
        os.posix_fallocate(file.fileno(), 0, size)
        return os.dup(file.fileno())


def local(plan: Plan) -> Segments:
    """The same of this process alone, all zeros."""
    return Segments(**{name: np.zeros(shape, kind) for name, (shape, kind) in _shapes(plan).items()})


def attach(plan: Plan, descriptors: dict[str, int]) -> Segments:
    """Map all segments. The mappings live as long as the arrays do."""
    views = {}
    for name, (shape, kind) in _shapes(plan).items():
        mapping = mmap.mmap(descriptors[name], prod(shape) * np.dtype(kind).itemsize)
        if name == "bundles" and hasattr(mmap, "MADV_HUGEPAGE"):
            # Where the system has large pages for shared memory, a virtual disk fills them up to 1.7 times as
            # fast as single ones (docs/tuning.md). Where it has none, this does nothing, or is refused.
            with contextlib.suppress(OSError):
                mapping.madvise(mmap.MADV_HUGEPAGE)
        views[name] = np.frombuffer(mapping, dtype=kind).reshape(shape)
    return Segments(**views)
