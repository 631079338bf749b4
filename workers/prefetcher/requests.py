"""Which bytes of `bundles.bin` go where: pure arithmetic, vectorised over the neurons of a part.

Neighbouring bundles become one read, as do bundles that a small gap separates; the gap's bytes go
to a sink and are counted. Slots need not be contiguous, since a read scatters over iovecs; where
they are, iovecs merge too, so that a streamed layer is read in large plain reads.

A part of decode is a few hundred bundles, and building its reads costs by the number of array operations:
with the caches full of the kernels' data, ten microseconds each.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from storage.layout import Layout

IOV_MAX = 1024  # most iovecs of one read, Linux's limit
DIRECT_UNIT = 512  # bytes; the least that direct I/O reads on any disk
PIECE_UNIT = 4096  # bytes; of the pieces of a larger unit but its last
IOVEC_BYTES = 16  # struct iovec of 64-bit systems: address and length
# Of a part's bundles: where fewer follow on a neighbour, joining them costs more than reading them apart.
# A read costs the kernel 3 µs, and finding out what to join took 100 for a part of 100 bundles.
FEW_JOINED = 1 / 8

Integers = npt.NDArray[np.int64]


def address(array: npt.NDArray[np.generic]) -> int:
    """Of the first element. (`array.ctypes.data` costs more than two array operations.)"""
    data: tuple[int, bool] = array.__array_interface__["data"]
    return data[0]


@dataclass(frozen=True, slots=True)
class Requests:
    """Reads that belong together, as arrays over the n reads. Bytes and addresses."""

    offsets: Integers  # [n] in the file
    lengths: Integers  # [n]
    firsts: Integers  # [n] first iovec of the read
    counts: Integers  # [n] iovecs of the read
    scattered: npt.NDArray[np.bool_]  # [n] whether it has several iovecs
    targets: Integers  # [n] where a single iovec points, else the first iovec's address
    widths: Integers  # [n] bytes of a single iovec, else `counts`
    iovecs: Integers  # [m, 2] addresses and bytes
    bundles: int
    gap_bytes: int
    total_bytes: int  # that the reads bring, gaps included
    plain: bool = False  # it is known that no read has several iovecs

    @classmethod
    def scatter(
        cls,
        offsets: Integers,
        bounds: Integers,
        iovecs: Integers,
        bundles: int = 0,
        gap_bytes: int = 0,
    ) -> Requests:
        """Read i starts at `offsets[i]` and fills `iovecs[bounds[i] : bounds[i + 1]]`."""
        firsts = bounds[:-1]
        counts = bounds[1:] - firsts
        lengths = np.add.reduceat(iovecs[:, 1], firsts) if firsts.size else firsts
        scattered = counts > 1
        vectors = firsts * IOVEC_BYTES + address(iovecs)
        return cls(
            offsets=offsets,
            lengths=lengths,
            firsts=firsts,
            counts=counts,
            scattered=scattered,
            targets=np.where(scattered, vectors, iovecs[firsts, 0]),
            widths=np.where(scattered, counts, lengths),
            iovecs=iovecs,
            bundles=bundles,
            gap_bytes=gap_bytes,
            total_bytes=int(lengths.sum()),
        )

    @classmethod
    def apart(cls, offsets: Integers, addresses: Integers, length: int) -> Requests:
        """A read of `length` bytes for each bundle."""
        count = offsets.size
        iovecs = np.empty((count, 2), np.int64)
        iovecs[:, 0] = addresses
        iovecs[:, 1] = length
        return cls(
            offsets=offsets,
            lengths=iovecs[:, 1],
            firsts=np.arange(count),
            counts=np.ones(count, np.int64),
            scattered=np.zeros(count, np.bool_),
            targets=iovecs[:, 0],
            widths=iovecs[:, 1],
            iovecs=iovecs,
            bundles=count,
            gap_bytes=0,
            total_bytes=count * length,
            plain=True,
        )

    def __len__(self) -> int:
        return self.offsets.size

    def vector(self, index: int) -> list[tuple[int, int]]:
        """(address, length) of read `index`'s iovecs."""
        first = int(self.firsts[index])
        part = self.iovecs[first : first + int(self.counts[index])]
        return [(base, length) for base, length in part.tolist()]

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
        return Requests.scatter(offset, np.array([0, len(left)]), np.array(left, np.int64))


@dataclass(frozen=True, slots=True)
class RequestBuilder:
    """Turns neurons and slots into requests. All sizes in bytes."""

    base: int  # address of slot 0
    slots: int
    stride: int  # of a slot, at least that of any unit
    layout: Layout  # of the file
    max_read: int
    max_gap: int
    sink: int  # address, aligned like the slots, of `sink_bytes` that may be overwritten at any time

    @staticmethod
    def sink_bytes(stride: int, max_gap: int) -> int:
        """The largest gap: gaps are whole bundles."""
        return max_gap // stride * stride

    def _bundles_per_read(self, stride: int) -> int:
        # A bundle and a gap bring at most one iovec for each `stride` of file, so this also keeps
        # a read within IOV_MAX iovecs.
        return min(max(1, self.max_read // stride), IOV_MAX)

    def build_halves(
        self, layer: int, positions: npt.NDArray[np.int32], slots: npt.NDArray[np.int32]
    ) -> Requests:
        """The same by two reads a bundle, first halves first: what a layout without bundles costs.

        A bundle is cut where direct I/O can read, so the same bytes come.
        """
        part = self.layout.layers[layer]
        cut = part.unit.stride // 2 // DIRECT_UNIT * DIRECT_UNIT
        if cut == 0 or positions.size == 0:
            return self.build(layer, positions, slots)
        offsets = part.offset(positions.astype(np.int64))
        bases = self.base + slots.astype(np.int64) * self.stride
        iovecs = np.empty((2 * positions.size, 2), np.int64)
        iovecs[:, 0] = np.concatenate((bases, bases + cut))
        iovecs[:, 1] = np.repeat((cut, part.unit.stride - cut), positions.size)
        return Requests.scatter(
            offsets=np.concatenate((offsets, offsets + cut)),
            bounds=np.arange(len(iovecs) + 1),
            iovecs=iovecs,
            bundles=positions.size,
        )

    def build(self, layer: int, positions: npt.NDArray[np.int32], slots: npt.NDArray[np.int32]) -> Requests:
        """Reads that bring the unit at file position `positions[i]` of `layer` into `slots[i]`."""
        assert positions.shape == slots.shape
        if positions.size == 0:
            return Requests.scatter(np.empty(0, np.int64), np.zeros(1, np.int64), np.empty((0, 2), np.int64))
        part = self.layout.layers[layer]
        stride = part.unit.stride
        if stride > self.max_read:
            return self._pieces(layer, positions, slots)
        if not self.max_gap and self._apart(positions):
            assert 0 <= positions[0] <= positions[-1] < part.units, "a neuron outside the layer"
            assert 0 <= slots.min() <= slots.max() < self.slots, "a slot outside the segment"
            wide = positions.astype(np.int64), slots.astype(np.int64)
            return Requests.apart(part.offset(wide[0]), wide[1] * self.stride + self.base, stride)
        both = np.array((positions, slots), np.int64)[:, positions.argsort(kind="stable")]
        position, slot = both
        step, slot_step = both[:, 1:] - both[:, :-1]
        assert 0 <= position[0] <= position[-1] < part.units, "a neuron outside the layer"
        assert step.min(initial=1) > 0, "a neuron is asked for twice"
        assert 0 <= slot.min() <= slot.max() < self.slots, "a slot outside the segment"

        starts = self._starts(position, step, stride)
        opens = starts.copy()  # whether this bundle does not extend the iovec before it
        opens[1:-1] |= (slot_step != 1) | (stride != self.stride)
        if self.max_gap:
            gap = np.zeros(position.size, np.int64)  # bundles between this one and the one before
            gap[1:] = np.where(starts[1:-1], 0, step - 1)
            opens[:-1] |= gap > 0
        heads = np.flatnonzero(opens)
        iovecs = np.empty((heads.size - 1, 2), np.int64)
        iovecs[:, 0] = slot[heads[:-1]] * self.stride + self.base
        iovecs[:, 1] = (heads[1:] - heads[:-1]) * stride
        bounds = np.flatnonzero(starts[heads])
        gaps = 0
        if self.max_gap and (gaps := int(gap.sum())):
            iovecs, bounds = self._with_sinks(iovecs, bounds, gap[heads[:-1]] * stride)
        return Requests.scatter(
            offsets=part.offset(position[starts[:-1]]),
            bounds=bounds,
            iovecs=iovecs,
            bundles=position.size,
            gap_bytes=gaps * stride,
        )

    def _pieces(self, layer: int, positions: npt.NDArray[np.int32], slots: npt.NDArray[np.int32]) -> Requests:
        """Units larger than a read, each by several reads of about one length, unit after unit.

        Several pieces under way fill the disk where a single read does not, and each goes into its place.
        """
        part = self.layout.layers[layer]
        stride = part.unit.stride
        length = -(-stride // -(-stride // self.max_read))
        length = -(-length // PIECE_UNIT) * PIECE_UNIT
        within = np.arange(0, stride, length)
        assert 0 <= slots.min() <= slots.max() < self.slots, "a slot outside the segment"
        assert 0 <= positions.min() <= positions.max() < part.units, "a neuron outside the layer"
        iovecs = np.empty((positions.size * within.size, 2), np.int64)
        iovecs[:, 0] = np.add.outer(self.base + slots.astype(np.int64) * self.stride, within).reshape(-1)
        iovecs[:, 1] = np.tile(np.minimum(length, stride - within), positions.size)
        return Requests.scatter(
            offsets=np.add.outer(part.offset(positions.astype(np.int64)), within).reshape(-1),
            bounds=np.arange(len(iovecs) + 1),
            iovecs=iovecs,
            bundles=positions.size,
        )

    def _apart(self, positions: npt.NDArray[np.int32]) -> bool:
        """Whether the positions ascend and few are neighbours."""
        step = positions[1:] - positions[:-1]
        if not step.size:
            return True
        return bool(step.min() > 0 and np.count_nonzero(step == 1) < FEW_JOINED * positions.size)

    def _starts(self, position: Integers, step: Integers, stride: int) -> npt.NDArray[np.bool_]:
        """Which bundles begin a read, and after them the end: [bundles + 1]."""
        starts = np.ones(position.size + 1, np.bool_)
        reach = 1 + self.max_gap // stride  # the largest step within a read
        starts[1:-1] = step > reach
        joined = starts.size - np.count_nonzero(starts)
        most = self._bundles_per_read(stride)
        if joined * reach >= most:  # else no run is too long
            # Runs that are too long are cut into windows of equal length from their beginning.
            run = np.cumsum(starts[:-1]) - 1
            window = (position - position[starts[:-1]][run]) // most
            starts[1:-1] |= window[1:] != window[:-1]
        return starts

    def _with_sinks(self, iovecs: Integers, bounds: Integers, gap: Integers) -> tuple[Integers, Integers]:
        """Insert an iovec into the sink before each of `iovecs` that has a gap, in bytes, before it."""
        before = np.flatnonzero(gap)
        sinks = np.empty((before.size, 2), np.int64)
        sinks[:, 0] = self.sink
        sinks[:, 1] = gap[before]
        return np.insert(iovecs, before, sinks, axis=0), bounds + np.searchsorted(before, bounds)
