"""The prefetcher's process: ReadBundles in, bundles in their slots, LayerPart out."""

from __future__ import annotations

import asyncio
import mmap
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pipeline.ring import process
from pipeline.ring.messages import LayerPart, Message, ReadBundles, ReportStats, Stats, Stop
from pipeline.ring.process import Worker
from pipeline.ring.promptness import be_prompt
from pipeline.ring.segments import ID, SLOT
from pipeline.ring.timeline import ASKED, BEGUN, GUESS_ASKED, GUESS_READ, READ
from storage.layout import Layout
from storage.manifest import BUNDLES
from workers.prefetcher.backend import Backend
from workers.prefetcher.bundle_file import BundleFile
from workers.prefetcher.pool import ReaderPool
from workers.prefetcher.queues import open_queues
from workers.prefetcher.requests import RequestBuilder, Requests
from workers.prefetcher.verifier import I32, Verifier


class Prefetcher:
    """Builds every part's reads, submits them and announces the part."""

    def __init__(
        self, worker: Worker, pool: ReaderPool, builder: RequestBuilder, verifier: Verifier | None = None
    ) -> None:
        self._worker = worker
        self._verifier = verifier
        self._pool = pool
        self._builder = builder
        self._positions = worker.store.positions()
        self._values: Counter[str] = Counter()
        self._split = worker.config.prefetcher.split
        self._busy = {"decode": 0.0, "stream": 0.0}  # seconds with reads in flight
        self._busy_before = 0.0
        self._seconds = 0.0  # from a part's request to its last byte, over all parts
        self.stopped = asyncio.Event()

    def handle(self, message: Message) -> None:
        match message:
            case ReadBundles():
                self._read(message)
            case ReportStats():
                self._worker.channel.send(
                    "supervisor", Stats(message.serial, self._worker.name, self.stats())
                )
            case Stop():
                self.stopped.set()

    def _read(self, message: ReadBundles) -> None:
        assert message.part >= 1, "part 0 is the cache's"
        self._mark(GUESS_ASKED if message.guess else ASKED, message, message.count)
        rows = slice(message.start, message.start + message.count)
        table = self._worker.segments.reads[message.layer]
        ids = table[ID, rows]
        assert ids.size == message.count, "a part beyond the read table"
        positions = ids if self._positions is None else self._positions[message.layer][ids]
        by_halves = self._split and not message.step.every
        build = self._builder.build_halves if by_halves else self._builder.build
        slots = table[SLOT, rows]
        requests = build(message.layer, positions, slots)
        asked = time.monotonic()
        if self._verifier is None:
            self._pool.submit(requests, lambda: self._announce(message, requests, asked), message.guess)
        else:
            # Copies, because the table may be written anew before the last byte of a guess is there.
            where = positions.copy(), slots.copy()
            self._pool.submit(requests, lambda: self._verify(message, requests, asked, where), message.guess)
        if not message.guess:
            self._mark(BEGUN, message)

    def _verify(self, message: ReadBundles, requests: Requests, asked: float, where: tuple[I32, I32]) -> None:
        """Announce a part whose units are what was written; read again, once, those that are not."""
        verifier = self._verifier
        assert verifier is not None
        again = verifier.wrong(message.layer, *where)
        if not again[0].size:
            self._announce(message, requests, asked)
            return

        def once_more() -> None:
            verifier.check(message.layer, *again)
            self._announce(message, requests, asked)

        self._pool.submit(self._builder.build(message.layer, *again), once_more, message.guess)

    def _mark(self, event: int, message: ReadBundles, value: int = 0) -> None:
        self._worker.timeline.mark(event, message.step.number, message.layer, message.part, value)

    def _announce(self, message: ReadBundles, requests: Requests, asked: float) -> None:
        part = LayerPart(message.run, message.step.number, message.layer, message.part, (), (), False)
        self._mark(GUESS_READ if message.guess else READ, message, requests.total_bytes)
        self._worker.channel.send("compute", part)
        kind = "stream" if message.step.every else "decode"
        self._values[f"{kind}_bytes"] += requests.total_bytes
        self._values[f"{kind}_reads"] += len(requests)
        self._values[f"{kind}_bundles"] += requests.bundles
        self._values[f"{kind}_gap_bytes"] += requests.gap_bytes
        self._values["parts"] += 1
        # A prefill's reads are done before decode's begin, so what passed since the last part is this kind's.
        busy = self._pool.counters.busy()
        self._busy[kind] += busy - self._busy_before
        self._busy_before = busy
        self._seconds += time.monotonic() - asked

    def stats(self) -> dict[str, float]:
        """Counters since start; bytes, numbers and seconds."""
        names = [f"{kind}_{what}" for kind in ("decode", "stream") for what in COUNTED]
        counters = self._pool.counters
        values = {name: float(self._values[name]) for name in [*names, "parts"]}
        return values | {
            "busy_seconds": counters.busy(),
            "decode_busy_seconds": self._busy["decode"],
            "stream_busy_seconds": self._busy["stream"],
            "part_seconds": self._seconds,
            "cpu_seconds": time.process_time(),
            "batches": float(counters.batches),
            "wakes": float(counters.wakes),
            "retries": float(counters.retries),
            "peak_in_flight": float(counters.peak_in_flight),
            "in_flight": float(counters.in_flight),
            "backlog": float(self._pool.backlog),
            "verified": float(self._verifier.verified if self._verifier else 0),
            "read_again": float(self._verifier.read_again if self._verifier else 0),
        }


COUNTED = ("bytes", "reads", "bundles", "gap_bytes")


class Describer:
    """Names the bundle at a file offset."""

    def __init__(self, path: Path, layout: Layout, order: Sequence[npt.NDArray[np.int32]] | None) -> None:
        self._path, self._layout, self._order = path, layout, order

    def __call__(self, offset: int) -> str:
        layer, position = self._layout.place(offset)
        number = position if self._order is None else int(self._order[layer][position])
        return f"layer {layer}, {self._layout.layers[layer].unit.kind} {number} from {self._path}"


async def main(worker: Worker, through: Callable[[Backend], Backend] = lambda queue: queue) -> None:
    """`through` stands between the reader and its queues; only tests of faults want anything there."""
    be_prompt()
    settings = worker.config.prefetcher
    stride = worker.plan.stride
    sink = np.frombuffer(
        mmap.mmap(-1, RequestBuilder.sink_bytes(stride, settings.max_gap) + stride), np.uint8
    )
    path = worker.store.path / BUNDLES
    with BundleFile.open(path, stride, settings.direct) as file:
        bundles = worker.segments.bundles
        queues, chosen = await open_queues(
            settings.backend, file, settings.queue_depth, settings.readers, bundles
        )
        describe = Describer(path, worker.store.layout, worker.store.order())
        pool = ReaderPool(
            [through(queue) for queue in queues],
            settings.queue_depth,
            file.size,
            describe,
            settings.in_flight,
        )
        builder = RequestBuilder(
            base=bundles.ctypes.data,
            slots=bundles.shape[0],
            stride=stride,
            layout=worker.store.layout,
            max_read=settings.max_read,
            max_gap=settings.max_gap,
            sink=sink.ctypes.data,
        )
        try:
            verifier, checked = Verifier.wanted(worker.config.storage.verify, worker.store, bundles)
            note = f"{chosen}, {settings.readers} × {settings.queue_depth} deep, {file.note}, {checked}"
            await serve(worker, Prefetcher(worker, pool, builder, verifier), pool, note)
        finally:
            await pool.close()


async def serve(worker: Worker, prefetcher: Prefetcher, pool: ReaderPool, *notes: str) -> None:
    """Answer messages until Stop, then drain. Raises what a read or a message raised."""
    failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def handle(message: Message) -> None:
        try:
            prefetcher.handle(message)
        except Exception as error:
            if not failed.done():
                failed.set_exception(error)

    async def until_stopped() -> None:
        await prefetcher.stopped.wait()
        await pool.drained()

    worker.channel.on_message("prefetcher", handle)
    worker.ready(*notes)
    tasks = {asyncio.ensure_future(pool.run()), asyncio.ensure_future(until_stopped()), failed}
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


if __name__ == "__main__":
    process.run_on_loop("prefetcher", ("prefetcher",), main)
