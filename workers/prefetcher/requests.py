"""Which bytes of `bundles.bin` go where: pure planning, vectorised over the neurons of a part.

Neighbouring bundles become one read, as do bundles that a small gap separates; the gap's bytes go
to a sink and are counted. Slots need not be contiguous, since a read scatters over iovecs; where
they are, iovecs merge too, so that a streamed layer is read in large plain reads.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

IOV_MAX = 1024  # most iovecs of one read, Linux's limit
DIRECT_UNIT = 512  # bytes; the least that direct I/O reads on any disk
IOVEC = np.dtype([("base", np.uint64), ("length", np.uint64)])  # struct iovec of 64-bit systems

Integers = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Requests:
    """Reads that belong together, as arrays over the n reads. Bytes and addresses."""

    offsets: Integers  # [n] in the file
    lengths: Integers  # [n]
    firsts: Integers  # [n] first iovec of the read
    counts: Integers  # [n] iovecs of the read
    scattered: npt.NDArray[np.bool_]  # [n] whether it has several iovecs
    targets: npt.NDArray[np.uint64]  # [n] where a single iovec points, else the first iovec's address
    widths: Integers  # [n] bytes of a single iovec, else `counts`
    iovecs: npt.NDArray[np.void]  # [m] of IOVEC
    bundles: int
    gap_bytes: int

    @classmethod
    def scatter(
        cls,
        offsets: Integers,
        firsts: Integers,
        iovecs: npt.NDArray[np.void],
        bundles: int = 0,
        gap_bytes: int = 0,
    ) -> Requests:
        """Read i starts at `offsets[i]` and fills `iovecs[firsts[i] : firsts[i + 1]]`."""
        counts = np.diff(firsts, append=iovecs.size)
        sizes = iovecs["length"].astype(np.int64)
        lengths = np.add.reduceat(sizes, firsts) if firsts.size else sizes
        scattered = counts > 1
        vectors = np.uint64(iovecs.ctypes.data) + firsts.astype(np.uint64) * np.uint64(IOVEC.itemsize)
        return cls(
            offsets=offsets,
            lengths=lengths,
            firsts=firsts,
            counts=counts,
            scattered=scattered,
            targets=np.where(scattered, vectors, iovecs["base"][firsts]),
            widths=np.where(scattered, counts, lengths),
            iovecs=iovecs,
            bundles=bundles,
            gap_bytes=gap_bytes,
        )

    @property
    def total_bytes(self) -> int:
        """Bytes that the reads bring, gaps included."""
        return int(self.lengths.sum())

    def __len__(self) -> int:
        return self.offsets.size

    def vector(self, index: int) -> list[tuple[int, int]]:
        """(address, length) of read `index`'s iovecs."""
        first = int(self.firsts[index])
        part = self.iovecs[first : first + int(self.counts[index])]
        return [(int(base), int(length)) for base, length in part]

    def remainder(self, index: int, done: int) -> Requests:
        """What is left of read `index` after its first `done` bytes."""
        assert 0 <= done < self.lengths[index]
        left = []
        skip = done
        for base, length in self.vector(index):
            if skip < length:
                left.append((base + skip, length - skip))
            skip = max(0, skip - length)
        offset = np.array([int(self.offsets[index]) + done], np.int64)
        return Requests.scatter(offset, np.zeros(1, np.int64), np.array(left, IOVEC))


@dataclass(frozen=True, slots=True)
class Planner:
    """Turns neurons and slots into requests. All sizes in bytes."""

    base: int  # address of slot 0
    slots: int
    stride: int  # of a bundle, in the file and in the slots
    d_ff: int
    max_read: int
    max_gap: int
    sink: int  # address, aligned like the slots, of `sink_bytes` that may be overwritten at any time

    @staticmethod
    def sink_bytes(stride: int, max_gap: int) -> int:
        """The largest gap: gaps are whole bundles."""
        return max_gap // stride * stride

    @property
    def _bundles_per_read(self) -> int:
        # A bundle and a gap bring at most one iovec for each `stride` of file, so this also keeps
        # a read within IOV_MAX iovecs.
        return min(max(1, self.max_read // self.stride), IOV_MAX)

    def plan_halves(
        self, layer: int, positions: npt.NDArray[np.int32], slots: npt.NDArray[np.int32]
    ) -> Requests:
        """The same by two reads a bundle, first halves first: what a layout without bundles costs.

        A bundle is cut where direct I/O can read, so the same bytes come.
        """
        cut = self.stride // 2 // DIRECT_UNIT * DIRECT_UNIT
        if cut == 0 or positions.size == 0:
            return self.plan(layer, positions, slots)
        offsets = (layer * self.d_ff + positions.astype(np.int64)) * self.stride
        bases = self.base + slots.astype(np.int64) * self.stride
        iovecs = np.empty(2 * positions.size, IOVEC)
        iovecs["base"] = np.concatenate((bases, bases + cut))
        iovecs["length"] = np.repeat((cut, self.stride - cut), positions.size)
        return Requests.scatter(
            offsets=np.concatenate((offsets, offsets + cut)),
            firsts=np.arange(iovecs.size),
            iovecs=iovecs,
            bundles=positions.size,
        )

    def plan(self, layer: int, positions: npt.NDArray[np.int32], slots: npt.NDArray[np.int32]) -> Requests:
        """Reads that bring the bundle at file position `positions[i]` of `layer` into `slots[i]`."""
        assert positions.shape == slots.shape
        if positions.size == 0:
            nothing = np.empty(0, np.int64)
            return Requests.scatter(nothing, nothing, np.empty(0, IOVEC))
        order = np.argsort(positions, kind="stable")
        position = positions[order].astype(np.int64)
        slot = slots[order].astype(np.int64)
        step = np.diff(position)
        assert 0 <= position[0] <= position[-1] < self.d_ff, "a neuron outside the layer"
        assert (step > 0).all(), "a neuron is asked for twice"
        assert 0 <= slot.min() <= slot.max() < self.slots, "a slot outside the segment"

        starts = self._starts(position, step)
        gap = np.zeros(position.size, np.int64)  # bundles between this one and the one before
        gap[1:] = step - 1
        gap[starts] = 0
        has_gap = gap > 0
        opens = starts | has_gap  # this bundle does not extend the iovec before it
        opens[1:] |= slot[1:] != slot[:-1] + 1

        place = np.cumsum(opens.astype(np.int64) + has_gap) - 1  # index of each bundle's iovec
        iovecs = np.empty(int(place[-1]) + 1, IOVEC)
        heads = np.flatnonzero(opens)
        iovecs["base"][place[heads]] = self.base + slot[heads] * self.stride
        iovecs["length"][place[heads]] = np.diff(heads, append=position.size) * self.stride
        iovecs["base"][place[has_gap] - 1] = self.sink
        iovecs["length"][place[has_gap] - 1] = gap[has_gap] * self.stride
        return Requests.scatter(
            offsets=(layer * self.d_ff + position[starts]) * self.stride,
            firsts=place[starts],
            iovecs=iovecs,
            bundles=position.size,
            gap_bytes=int(gap.sum()) * self.stride,
        )

    def _starts(self, position: Integers, step: Integers) -> npt.NDArray[np.bool_]:
        """Which bundles begin a read."""
        starts = np.ones(position.size, np.bool_)
        starts[1:] = (step - 1) * self.stride > self.max_gap
        # Runs that are too long are cut into windows of equal length from their beginning.
        run = np.cumsum(starts) - 1
        window = (position - position[starts][run]) // self._bundles_per_read
        starts[1:] |= window[1:] != window[:-1]
        return starts
