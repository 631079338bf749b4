"""Units on their way to a device, and those that stay there: a mirror of the slots.

The layers that are mirrored have a row of device memory for each of their slots. A unit's bytes never change,
so a row that has once held a unit holds it until another one is put there: only what is new goes over. Units
of other layers, and what lies in staging, go over whenever they are used.

On CUDA all of it runs on a stream of its own, while the device computes. A part's new units are gathered
into page-locked memory and go over in one copy; large ones, such as experts, go over straight from the slots,
where those could be page-locked (`pages.py`). Elsewhere the same steps run one after the other.
"""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import cycle, pairwise
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from workers.compute.device import I32, Bytes

BUFFER: Final = 16 << 20  # bytes of one page-locked buffer
BUFFERS: Final = 4
DIRECT: Final = 256 << 10  # bytes of a unit from which a copy of its own costs less than gathering it


@dataclass(frozen=True, slots=True)
class Piece:
    """Some units on the device: those of `rows` [..., stride] that `which` names; None: all, in order."""

    ids: I32
    rows: Tensor
    which: npt.NDArray[np.intp] | None = None


@dataclass(slots=True)
class _Buffer:
    """Page-locked memory, free again after `done`."""

    memory: Tensor
    done: torch.cuda.Event


class Shelf:
    """Brings units over. `counts` are totals since the start, for any thread."""

    def __init__(self, where: torch.device, stride: int = 0, slots: int = 0, direct: bool = False) -> None:
        """A mirror of the first `slots` slots, of `stride` bytes each; without, nothing stays.

        `direct`: units go over straight from the slots; on CUDA those should be page-locked.
        """
        self._where = where
        self._direct = direct
        self._mirror = torch.empty((slots, stride), dtype=torch.uint8, device=where)
        self._held = np.full(slots, -1, np.int32)  # id of the unit in each row: a slot is one layer's
        self._copying = torch.cuda.Stream(where) if where.type == "cuda" else None
        self._read: torch.cuda.Event | None = None  # after which the mirror's rows may be written again
        self._buffers: Iterator[_Buffer] | None = None
        self.every = False  # of the step at hand
        self.counts: dict[str, float] = defaultdict(float)

    def bring(self, ids: I32, slots: I32, memory: Bytes) -> list[Piece]:
        """Units `ids`, which lie in `slots` of the host's `memory` [slots, stride]; it may change then."""
        started = time.perf_counter()
        mirrored = slots < len(self._held)
        pieces = []
        if mirrored.any():
            own, places = ids[mirrored], slots[mirrored]
            new = self._held[places] != own
            if new.any():
                self._renew(places[new], memory)
                self._held[places[new]] = own[new]
            pieces.append(Piece(own, self._mirror, places.astype(np.intp)))
        if not mirrored.all():
            own, places = ids[~mirrored], slots[~mirrored]
            with self._stream():
                pieces.append(Piece(own, self._over(places, memory)))
        kind = "prefill" if self.every else "decode"
        self.counts[f"{kind}_transfer_seconds"] += time.perf_counter() - started
        return pieces

    def _renew(self, slots: I32, memory: Bytes) -> None:
        """Copy these slots to their rows of the mirror."""
        with self._stream():
            units = self._over(slots, memory)  # meanwhile the rows may still be read
            if self._copying is not None and self._read is not None:
                self._copying.wait_event(self._read)
            self._mirror.index_copy_(0, self._indices(slots), units)

    def _over(self, slots: I32, memory: Bytes) -> Tensor:
        """The bytes of these slots on the device, [n, stride], on the stream that copies."""
        kind = "prefill" if self.every else "decode"
        self.counts[f"{kind}_bus_bytes"] += slots.size * memory.shape[1]
        host, which = torch.from_numpy(memory), torch.from_numpy(slots.astype(np.int64))
        if np.array_equal(slots, np.arange(len(memory))):  # all of them, such as a stream's buffer
            return host.to(self._where)
        if self._copying is None and not self._direct:
            return host.index_select(0, which).to(self._where)
        out = torch.empty((slots.size, memory.shape[1]), dtype=torch.uint8, device=self._where)
        if self._direct:
            self._one_by_one(slots, host, out)
        else:
            self._by_buffers(which, host, out)
        return out

    def _one_by_one(self, slots: I32, host: Tensor, out: Tensor) -> None:
        """Straight from their slots, neighbours together. It waits, for those may have other units then."""
        ends = np.flatnonzero(np.diff(slots) != 1) + 1
        for start, end in pairwise([0, *ends.tolist(), slots.size]):
            first = int(slots[start])
            out[start:end].copy_(host[first : first + end - start], non_blocking=self._copying is not None)
        if self._copying is not None:
            self._copying.synchronize()

    def _by_buffers(self, which: Tensor, host: Tensor, out: Tensor) -> None:
        """Through page-locked buffers, each gathered while the one before goes over."""
        assert self._copying is not None
        stride = host.shape[1]
        step = max(1, BUFFER // stride)
        for start in range(0, which.numel(), step):
            some = which[start : start + step]
            buffer = self._next_buffer(stride)
            gathered = buffer.memory[: some.numel() * stride].view(some.numel(), -1)
            torch.index_select(host, 0, some, out=gathered)
            out[start : start + step].copy_(gathered, non_blocking=True)
            buffer.done.record(self._copying)

    def _next_buffer(self, stride: int) -> _Buffer:
        if self._buffers is None:
            size = max(BUFFER, stride)
            self._buffers = cycle(
                [
                    _Buffer(torch.empty(size, dtype=torch.uint8, pin_memory=True), torch.cuda.Event())
                    for _ in range(BUFFERS)
                ]
            )
        buffer = next(self._buffers)
        buffer.done.synchronize()
        return buffer

    def gather(self, pieces: list[Piece], order: npt.NDArray[np.intp]) -> Tensor:
        """All units of `pieces`, in the given order of their concatenation: [n, stride]."""
        if self._copying is not None:
            computing = torch.cuda.current_stream(self._where)
            computing.wait_stream(self._copying)
            for piece in pieces:
                piece.rows.record_stream(computing)
        if len(pieces) == 1:
            (piece,) = pieces
            which = order if piece.which is None else piece.which[order]
            found = piece.rows.index_select(0, self._indices(which))
        else:
            parts = [
                piece.rows if piece.which is None else piece.rows.index_select(0, self._indices(piece.which))
                for piece in pieces
            ]
            found = torch.cat(parts).index_select(0, self._indices(order))
        if self._copying is not None:
            self._read = torch.cuda.Event()
            self._read.record()
        return found

    def _indices(self, which: npt.NDArray[np.integer[Any]]) -> Tensor:
        # CUDA takes its own copy of memory that is not page-locked before this returns; Metal does not.
        over = torch.from_numpy(which.astype(np.int64))
        return over.to(self._where, non_blocking=self._copying is not None)

    def _stream(self) -> contextlib.AbstractContextManager[object]:
        return contextlib.nullcontext() if self._copying is None else torch.cuda.stream(self._copying)
