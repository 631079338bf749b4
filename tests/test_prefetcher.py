"""The prefetcher: every backend brings the right bytes, faults are handled, the process answers."""

from __future__ import annotations

import asyncio
import errno
import mmap
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
import numpy.typing as npt
import pytest
import uvloop
from stores import bundle_store, raw_bundles

from pipeline.config import Config
from pipeline.ring import segments
from pipeline.ring.channel import Channel
from pipeline.ring.messages import (
    Failed,
    LayerPart,
    Message,
    ReadBundles,
    ReportStats,
    RingReady,
    Stats,
    Step,
    Stop,
    WorkerReady,
)
from pipeline.ring.plan import Forecast, Plan
from pipeline.ring.process import WorkerSpec
from pipeline.ring.promptness import shared_core, starting_prompt_threads
from pipeline.ring.segments import ID, SLOT
from storage.errors import ConfigError, StoreCorrupt, StoreError
from storage.manifest import BUNDLES
from storage.store import Store
from workers.prefetcher import io_uring
from workers.prefetcher.backend import Backend, BackendUnavailable, Completed
from workers.prefetcher.bundle_file import BundleFile
from workers.prefetcher.io_uring import IoUring
from workers.prefetcher.pool import ReaderPool
from workers.prefetcher.queues import open_queues
from workers.prefetcher.requests import RequestBuilder, Requests
from workers.prefetcher.threads import Threads
from workers.probe.reads import measure

BACKENDS = ("io_uring", "threads", "aiofiles")
LINUX = tuple(int(part) for part in os.uname().release.split(".")[:2])
REGISTERED = [  # queues that share registered buffers
    pytest.param(1, marks=pytest.mark.skipif(LINUX < (5, 14), reason="memfds register from Linux 5.14 on")),
    pytest.param(3, marks=pytest.mark.skipif(LINUX < (6, 12), reason="queues share from Linux 6.12 on")),
]
WAIT = 30.0  # seconds; far above what anything here takes


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return bundle_store(tmp_path_factory.mktemp("prefetcher") / "store")


def plan_of(store: Store) -> Plan:
    layout = store.layout
    return Plan(
        d_model=store.architecture.d_model,
        units=layout.units,
        stride=layout.stride,
        slots=layout.units,
        staging=8,
        context=16,
        hidden_rows=1,
        forecast=Forecast("all", 1, refine=False),
    )


# -- pools ------------------------------------------------------------------------------------


@dataclass
class Bench:
    """A pool over a store's bundles, and slots for it to fill."""

    pool: ReaderPool
    builder: RequestBuilder
    slots: npt.NDArray[np.uint8]  # [layers · d_ff, stride]


Body = Callable[[Bench], Coroutine[Any, Any, None]]
Wrap = Callable[[Backend], Backend]


def with_pool(
    store: Store,
    backend: str,
    body: Body,
    readers: int = 2,
    depth: int = 4,
    wrap: Wrap = lambda queue: queue,
    max_gap: int = 0,
    path: Path | None = None,
    direct: bool = True,
    in_flight: int | None = None,
) -> None:
    """Run `body` with a pool; what a reader raises is raised."""

    async def main() -> None:
        layout = store.layout
        memory = segments.create(plan_of(store))
        slots = segments.attach(plan_of(store), memory).bundles
        for descriptor in memory.values():
            os.close(descriptor)
        sink = np.frombuffer(mmap.mmap(-1, max_gap + layout.stride), np.uint8)
        builder = RequestBuilder(
            slots.ctypes.data,
            slots.shape[0],
            layout.stride,
            layout,
            4096,
            max_gap,
            sink.ctypes.data,
        )
        with BundleFile.open(path or store.path / BUNDLES, layout.stride, direct) as file:
            queues = [wrap(queue) for queue in (await open_queues(backend, file, depth, readers, slots))[0]]
            pool = ReaderPool(queues, depth, file.size, lambda at: f"bundle {at // layout.stride}", in_flight)
            tasks = [
                asyncio.ensure_future(pool.run()),
                asyncio.ensure_future(body(Bench(pool, builder, slots))),
            ]
            try:
                done, _ = await asyncio.wait(tasks, timeout=WAIT, return_when=asyncio.FIRST_COMPLETED)
                assert done, "the reads never ended"
                for task in done:
                    task.result()
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
                await pool.close()

    uvloop.run(main())


def requests_for(bench: Bench, layer: int, ids: list[int], slots: list[int]) -> Requests:
    return bench.builder.build(layer, np.array(ids, np.int32), np.array(slots, np.int32))


async def read_and_check(bench: Bench, store: Store, seed: int = 0) -> None:
    """Scattered reads of one layer, a streamed layer, and both at once, all against the file."""
    raw = raw_bundles(store)
    generator = np.random.default_rng(seed)
    d_ff = store.layout.most_units
    ids = generator.choice(d_ff, 40, replace=False)
    slots = generator.choice(d_ff, 40, replace=False)
    scattered = requests_for(bench, 0, ids.tolist(), slots.tolist())
    streamed = requests_for(bench, 2, list(range(d_ff)), list(range(d_ff, 2 * d_ff)))
    await asyncio.gather(bench.pool.read(scattered), bench.pool.read(streamed))
    assert (bench.slots[slots] == raw[0, ids]).all()
    assert (bench.slots[d_ff : 2 * d_ff] == raw[2]).all()
    untouched = np.setdiff1d(np.arange(bench.slots.shape[0]), [*slots, *range(d_ff, 2 * d_ff)])
    assert not bench.slots[untouched].any()
    assert bench.pool.counters.in_flight == 0
    assert bench.pool.backlog == 0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("readers", "depth"), [(1, 1), (1, 3), (3, 4), (2, 64)])
def test_every_backend_brings_the_bytes(store: Store, backend: str, readers: int, depth: int) -> None:
    with_pool(store, backend, lambda bench: read_and_check(bench, store), readers, depth)


@pytest.mark.parametrize("readers", REGISTERED)
def test_reads_across_registered_buffers_bring_the_bytes(
    store: Store, monkeypatch: pytest.MonkeyPatch, readers: int
) -> None:
    """Buffers that end within a slot, so that some reads of a slot, or of several, need two."""
    monkeypatch.setattr(io_uring, "BUFFER_BYTES", 9 * store.layout.stride + store.layout.stride // 2)
    used: set[int] = set()
    prepare = IoUring.prepare

    def watched(queue: IoUring, *given: Any) -> memoryview:
        prepared = prepare(queue, *given)
        used.update(np.frombuffer(prepared, np.int64).reshape(-1, 8)[:, io_uring.BUFFER].tolist())
        return prepared

    monkeypatch.setattr(IoUring, "prepare", watched)
    with_pool(store, "io_uring", lambda bench: read_and_check(bench, store), readers)
    assert len(used) > 10


@pytest.mark.parametrize("readers", REGISTERED)
def test_plain_reads_use_registered_buffers(store: Store, readers: int) -> None:
    async def main() -> None:
        memory = np.frombuffer(mmap.mmap(-1, 64 << 10), np.uint8)
        with BundleFile.open(store.path / BUNDLES, store.layout.stride) as file:
            queues, note = await open_queues("io_uring", file, 2, readers, memory)
            assert note.endswith(", registered buffers")
            builder = RequestBuilder(
                memory.ctypes.data,
                16,
                store.layout.stride,
                store.layout,
                1 << 20,
                0,
                memory.ctypes.data,
            )
            ids, slots = np.array([1, 5, 6], np.int32), np.array([0, 3, 2], np.int32)
            (prepared,) = {bytes(queue.prepare(builder.build(0, ids, slots), 1)) for queue in queues}
            opcodes = [prepared[at] for at in range(0, len(prepared), io_uring.ENTRY)]
            assert opcodes == [io_uring.OP_READ_FIXED, io_uring.OP_READV]
            for queue in queues:
                await queue.close()

    uvloop.run(main())


@pytest.mark.parametrize(("readers", "refused"), [(1, "register"), (3, "register"), (3, "register_as")])
def test_where_buffers_cannot_be_registered_reads_do_without(
    store: Store, monkeypatch: pytest.MonkeyPatch, readers: int, refused: str
) -> None:
    monkeypatch.setattr(IoUring, refused, lambda *_: "Cannot allocate memory")

    async def main() -> None:
        with BundleFile.open(store.path / BUNDLES, store.layout.stride) as file:
            memory = np.zeros(1 << 20, np.uint8)
            queues, note = await open_queues("io_uring", file, 2, readers, memory)
            assert note.endswith("buffers not registered (Cannot allocate memory)")
            for queue in queues:
                assert isinstance(queue, IoUring)
                assert queue._registered is None
                await queue.close()

    with_pool(store, "io_uring", lambda bench: read_and_check(bench, store), readers)
    uvloop.run(main())


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_page_cache_and_gaps_bring_the_same(store: Store, backend: str) -> None:
    gap = 3 * store.layout.stride
    with_pool(store, backend, lambda bench: read_and_check(bench, store), max_gap=gap, direct=False)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("bundles", "most"), [(1, 2), (6, 6), (200, 16)])
def test_bytes_in_flight_are_limited(store: Store, backend: str, bundles: int, most: int) -> None:
    """At least one read for each of two readers, at most their depth of 8."""

    async def body(bench: Bench) -> None:
        await read_and_check(bench, store)
        before = bench.pool.counters.peak_in_flight
        for half in range(2):  # neither neighbours nor gaps: every bundle is a read
            ids = list(range(half, store.layout.most_units, 4))
            bench.pool.submit(requests_for(bench, 1, ids, ids), lambda: None)
        assert bench.pool.counters.in_flight == most
        await bench.pool.drained()
        assert max(before, most) == bench.pool.counters.peak_in_flight

    with_pool(store, backend, body, 2, 8, in_flight=bundles * store.layout.stride)


@pytest.mark.parametrize("backend", BACKENDS)
def test_many_small_parts_at_once(store: Store, backend: str) -> None:
    raw = raw_bundles(store)

    async def body(bench: Bench) -> None:
        d_ff = store.layout.most_units
        order: list[int] = []
        for i in range(d_ff):  # more than the queues hold
            bench.pool.submit(requests_for(bench, 1, [i], [d_ff - 1 - i]), lambda i=i: order.append(i))  # type: ignore[misc]
        assert bench.pool.backlog > 0
        await bench.pool.drained()
        assert sorted(order) == list(range(d_ff))
        assert (bench.slots[:d_ff][::-1] == raw[1]).all()
        assert bench.pool.counters.peak_in_flight == 2 * 4

    with_pool(store, backend, body)


@pytest.mark.parametrize("backend", BACKENDS)
def test_guesses_wait_for_everything_else(store: Store, backend: str) -> None:
    async def body(bench: Bench) -> None:
        order: list[str] = []
        for slot, (name, guess) in enumerate((("guess", True), ("other guess", True), ("set", False))):
            requests = requests_for(bench, 1, list(range(0, 24, 2)), list(range(12 * slot, 12 * slot + 12)))
            bench.pool.submit(requests, lambda name=name: order.append(name), guess)  # type: ignore[misc]
        await bench.pool.drained()
        # One read of the first guess was under way before the set was asked for.
        assert order == ["set", "guess", "other guess"]

    with_pool(store, backend, body, readers=1, depth=1)


def test_a_part_is_spread_over_the_readers(store: Store) -> None:
    submitted: list[int] = []

    class Counting(Faulty):
        def submit(self, prepared: Any, start: int, stop: int) -> None:
            submitted.append(stop - start)
            super().submit(prepared, start, stop)

    async def body(bench: Bench) -> None:
        await bench.pool.read(requests_for(bench, 0, list(range(0, 24, 2)), list(range(12))))
        assert submitted[:3] == [4, 4, 4]

    with_pool(store, "threads", body, readers=3, depth=64, wrap=Counting)


# -- faults -----------------------------------------------------------------------------------


class Faulty:
    """A backend that does what another does; subclasses misbehave."""

    def __init__(self, inner: Backend) -> None:
        self.inner = inner
        self.faults = 0

    def on_completed(self, tell: Callable[[Completed], None]) -> None:
        self.inner.on_completed(
            lambda completed: tell([(row, serial, self.result(result)) for row, serial, result in completed])
        )

    def prepare(self, requests: Requests, serial: int, row: int = 0) -> Any:
        return self.inner.prepare(requests, serial, row)

    def submit(self, prepared: Any, start: int, stop: int) -> None:
        self.inner.submit(prepared, start, stop)

    def result(self, result: int) -> int:
        return result

    async def close(self) -> None:
        await self.inner.close()


class Short(Faulty):
    """Every other read of several sectors brings one sector only, and the rest as garbage."""

    def result(self, result: int) -> int:
        self.faults += 1
        return 512 if result > 512 and self.faults % 2 else result


class Busy(Faulty):
    """Two of three reads are refused for now."""

    def result(self, result: int) -> int:
        self.faults += 1
        return (-errno.EAGAIN, -errno.EINTR, result)[self.faults % 3]


class Broken(Faulty):
    """From the sixth read on a sector is bad."""

    def result(self, result: int) -> int:
        self.faults += 1
        return -errno.EIO if self.faults >= 6 else result


class Shaken(Faulty):
    """The fifth read fails, and is sound the next time."""

    def result(self, result: int) -> int:
        self.faults += 1
        return -errno.EIO if self.faults == 5 else result


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("fault", [Short, Busy, Shaken])
def test_short_and_refused_reads_are_resumed(store: Store, backend: str, fault: type[Faulty]) -> None:
    async def body(bench: Bench) -> None:
        await read_and_check(bench, store)
        assert bench.pool.counters.retries > 0

    with_pool(store, backend, body, wrap=fault, max_gap=store.layout.stride)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_input_error_names_the_bundle(store: Store, backend: str) -> None:
    async def body(bench: Bench) -> None:
        await bench.pool.read(requests_for(bench, 1, list(range(0, 60, 2)), list(range(30))))

    with pytest.raises(StoreError, match=r"reading bundle \d+ failed: Input/output error"):
        with_pool(store, backend, body, wrap=Broken)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_early_end_of_file_names_the_bundle(store: Store, backend: str, tmp_path: Path) -> None:
    cut = tmp_path / "cut.bin"
    stride, d_ff = store.layout.stride, store.layout.most_units
    cut.write_bytes((store.path / BUNDLES).read_bytes()[: (2 * d_ff + 7) * stride + 100])

    async def body(bench: Bench) -> None:
        await bench.pool.read(requests_for(bench, 2, [3, 6, 7], [0, 1, 2]))

    with pytest.raises(StoreCorrupt, match=f"reading bundle {2 * d_ff + 7} met an unexpected end of file"):
        with_pool(store, backend, body, path=cut)


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_a_finished_part_raises_ends_the_pool(store: Store, backend: str) -> None:
    async def body(bench: Bench) -> None:
        def fail() -> None:
            raise ValueError("told of the last byte")

        bench.pool.submit(requests_for(bench, 1, [1, 5], [0, 1]), fail)
        await asyncio.Event().wait()

    with pytest.raises(ValueError, match="told of the last byte"):
        with_pool(store, backend, body)


# -- opening ----------------------------------------------------------------------------------


def test_a_stride_that_the_device_does_not_take_goes_through_the_page_cache(store: Store) -> None:
    with BundleFile.open(store.path / BUNDLES, 100) as file:
        assert "page cache, because" in file.note
        assert not file.flags & os.O_DIRECT


def test_a_file_system_without_direct_io_goes_through_the_page_cache(store: Store) -> None:
    memory = os.memfd_create("no-direct")  # on tmpfs
    try:
        os.write(memory, (store.path / BUNDLES).read_bytes())
        path = Path(f"/proc/self/fd/{memory}")
        with_pool(store, "threads", lambda bench: read_and_check(bench, store), path=path)
        with_pool(store, "io_uring", lambda bench: read_and_check(bench, store), path=path)
    finally:
        os.close(memory)


def test_a_missing_file_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="cannot be opened: No such file"):
        BundleFile.open(tmp_path / "absent", 512)


def test_without_io_uring_threads_read_and_say_why(store: Store) -> None:
    def refused(file: BundleFile, depth: int) -> IoUring:
        raise BackendUnavailable("the kernel refuses io_uring (Operation not permitted)")

    async def main() -> None:
        memory = np.zeros(4096, np.uint8)
        with BundleFile.open(store.path / BUNDLES, store.layout.stride) as file:
            (queue,), note = await open_queues("auto", file, 2, 1, memory, refused)
            await queue.close()
            assert note == "reads by threads, because the kernel refuses io_uring (Operation not permitted)"
            with pytest.raises(ConfigError, match="backend is io_uring, but the kernel refuses"):
                await open_queues("io_uring", file, 2, 1, memory, refused)

    uvloop.run(main())


def test_where_the_kernel_refuses_a_second_ring_all_queues_are_threads(store: Store) -> None:
    opened: list[IoUring] = []

    def second_refused(file: BundleFile, depth: int) -> IoUring:
        if opened:
            raise BackendUnavailable("the kernel refuses io_uring (Cannot allocate memory)")
        opened.append(IoUring(file, depth))
        return opened[0]

    async def main() -> None:
        with BundleFile.open(store.path / BUNDLES, store.layout.stride) as file:
            queues, note = await open_queues("auto", file, 2, 3, np.zeros(4096, np.uint8), second_refused)
            assert [type(queue) for queue in queues] == [Threads] * 3
            assert "because the kernel refuses io_uring (Cannot allocate memory)" in note
            with pytest.raises(OSError, match="Bad file descriptor"):
                os.fstat(opened[0]._ring)
            for queue in queues:
                await queue.close()

    uvloop.run(main())


def test_prompt_threads_share_one_of_two_cores_and_use_all_of_more() -> None:
    assert shared_core({3, 6}) == {6}
    assert shared_core({5}) == {5}
    assert shared_core({0, 1, 2}) == {0, 1, 2}


def test_who_starts_prompt_threads_stays_as_it_is() -> None:
    cores, priority = os.sched_getaffinity(0), os.getpriority(os.PRIO_PROCESS, 0)
    with starting_prompt_threads():
        found: list[set[int]] = []
        thread = threading.Thread(target=lambda: found.append(os.sched_getaffinity(0)))
        thread.start()
        thread.join()
    assert found == [shared_core(cores)]
    assert (os.sched_getaffinity(0), os.getpriority(os.PRIO_PROCESS, 0)) == (cores, priority)


def test_promptness_keeps_or_raises_the_priority() -> None:
    program = (
        "import os; from pipeline.ring.promptness import be_prompt; os.nice(5);"
        "be_prompt(); print(os.getpriority(os.PRIO_PROCESS, 0), os.sched_getscheduler(0) == os.SCHED_OTHER)"
    )
    root = str(Path(segments.__file__).resolve().parent.parent)
    environment = os.environ | {"PYTHONPATH": root}
    answer = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, env=environment
    )
    nice, ordinary = answer.stdout.split()
    assert int(nice) <= os.getpriority(os.PRIO_PROCESS, 0) + 5
    assert ordinary == "True"


# -- the process ------------------------------------------------------------------------------


@dataclass
class Ring:
    """A prefetcher process, and everybody else's ends."""

    process: subprocess.Popen[bytes]
    channel: Channel
    views: segments.Segments
    ready: WorkerReady

    def ask(self, layer: int, part: int, ids: list[int], slots: list[int], every: bool = False) -> None:
        self.views.reads[layer, ID, : len(ids)] = ids
        self.views.reads[layer, SLOT, : len(ids)] = slots
        self.channel.send("prefetcher", ReadBundles(1, Step(1, 0, 1, every), layer, part, 0, len(ids), False))

    def hear(self, inbox: str = "compute") -> Message:
        message = self.channel.receive(inbox, WAIT)
        assert message is not None, f"nothing came for {inbox}"
        return message


@contextmanager
def ring(store: Store, directory: Path, **settings: Any) -> Iterator[Ring]:
    """Start a prefetcher on `store`; it must be over when the block is."""
    plan = plan_of(store)
    descriptors = segments.create(plan)
    root = str(Path(segments.__file__).resolve().parent.parent)
    process = subprocess.Popen(
        [sys.executable, "-m", "workers.prefetcher"],
        stdin=subprocess.PIPE,
        pass_fds=tuple(descriptors.values()),
        env=os.environ | {"PYTHONPATH": root},
    )
    stdin = cast(IO[bytes], process.stdin)
    try:
        with Channel(directory, ("supervisor", "compute")) as channel:
            config = Config().replace(prefetcher={"queue_depth": 8, **settings})
            spec = WorkerSpec(
                name="prefetcher",
                directory=str(directory),
                store=str(store.path),
                identity=store.identity,
                config=config.model_dump(mode="json"),
                plan=plan.to_json(),
                descriptors=descriptors,
                routes={},
            )
            spec.write(cast(Any, stdin))
            ready = channel.receive("supervisor", WAIT)
            assert isinstance(ready, WorkerReady), ready
            channel.send("prefetcher", RingReady())
            yield Ring(process, channel, segments.attach(plan, descriptors), ready)
    finally:
        for descriptor in descriptors.values():
            os.close(descriptor)
        stdin.close()
        process.wait(WAIT)


@pytest.fixture
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(os.environ["TMPDIR"]) / tmp_path_factory.mktemp("r").name


@pytest.mark.parametrize("shuffled", [False, True])
def test_the_process_reads_counts_and_stops(tmp_path: Path, directory: Path, shuffled: bool) -> None:
    directory.mkdir()
    store = bundle_store(tmp_path / "store", shuffled=shuffled)
    raw, stride, d_ff = raw_bundles(store), store.layout.stride, store.layout.most_units
    with ring(store, directory) as one:
        assert len(one.ready.notes) == 1
        one.ask(1, 1, [3, 90, 4, 17], [100, 7, 101, 50])
        assert one.hear() == LayerPart(1, 1, 1, 1, (), (), False)
        assert (one.views.bundles[[100, 7, 101, 50]] == raw[1, [3, 90, 4, 17]]).all()
        one.ask(2, 2, list(range(d_ff)), list(range(2 * d_ff, 3 * d_ff)), every=True)
        assert one.hear() == LayerPart(1, 1, 2, 2, (), (), False)
        assert (one.views.bundles[2 * d_ff : 3 * d_ff] == raw[2]).all()
        one.ask(0, 1, [], [])
        assert one.hear() == LayerPart(1, 1, 0, 1, (), (), False)

        one.channel.send("prefetcher", ReportStats(9))
        stats = one.hear("supervisor")
        assert isinstance(stats, Stats)
        assert (stats.serial, stats.name) == (9, "prefetcher")
        values = stats.values
        assert (values["decode_bytes"], values["decode_bundles"]) == (4 * stride, 4)
        assert (values["stream_bytes"], values["stream_bundles"]) == (d_ff * stride, d_ff)
        assert values["decode_reads"] == (4 if shuffled else 3)
        assert values["stream_reads"] == -(-d_ff * stride // Config().prefetcher.max_read)
        assert values["decode_gap_bytes"] == values["stream_gap_bytes"] == 0
        assert values["in_flight"] == values["backlog"] == 0
        assert values["busy_seconds"] > 0

        one.channel.send("prefetcher", Stop())
        assert one.process.wait(WAIT) == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_forced_backend_is_used_and_named(store: Store, directory: Path, backend: str) -> None:
    directory.mkdir()
    with ring(store, directory, backend=backend, readers=3) as one:
        assert f"reads by {backend}, as configured" in one.ready.notes[0]
        one.ask(0, 1, list(range(0, 96, 3)), list(range(32)))
        one.ask(1, 1, list(range(0, 96, 3)), list(range(96, 128)))
        assert {cast(LayerPart, one.hear()).layer, cast(LayerPart, one.hear()).layer} == {0, 1}
        one.channel.send("prefetcher", Stop())
        assert one.process.wait(WAIT) == 0


def test_stop_drains_what_is_in_flight(store: Store, directory: Path) -> None:
    directory.mkdir()
    with ring(store, directory, readers=1, queue_depth=1) as one:
        for layer in range(3):
            one.ask(layer, 1, list(range(0, 96, 2)), list(range(96 * layer, 96 * layer + 48)))
        one.channel.send("prefetcher", Stop())
        assert [cast(LayerPart, one.hear()).layer for _ in range(3)] == [0, 1, 2]
        assert one.process.wait(WAIT) == 0


def test_a_truncated_file_and_a_malformed_message_are_reported(tmp_path: Path, directory: Path) -> None:
    directory.mkdir()
    store = bundle_store(tmp_path / "store")
    with ring(store, directory) as one:
        os.truncate(store.path / BUNDLES, store.layout.offset(1, 5))
        one.ask(1, 1, [2, 7], [0, 1])
        failed = one.hear("supervisor")
        assert isinstance(failed, Failed)
        assert failed.error.startswith("reading layer 1, neuron 7 from ")
        assert failed.error.endswith("bundles.bin met an unexpected end of file")
        assert one.process.wait(WAIT) == 1
    with ring(bundle_store(tmp_path / "other"), directory) as one:
        one.ask(1, 1, [2, 2], [0, 1])
        failed = one.hear("supervisor")
        assert isinstance(failed, Failed)
        assert "a neuron is asked for twice" in failed.error
        assert one.process.wait(WAIT) == 1


def test_measuring_takes_as_many_buffers_as_asked(store: Store) -> None:
    path, size = store.path / BUNDLES, store.layout.stride
    found = uvloop.run(measure(path, size, readers=1, depth=4, count=50, direct=False, buffers=4))
    assert found["peak_in_flight"] == 4
    for wrong, why in (
        (("--depth", "4", "--buffers", "3"), "--buffers must be at least as many as the reads in flight"),
        (("--bytes", str(10**15)), "is smaller than one read of 1,000,000,000,000,000 bytes"),
    ):
        line = [sys.executable, "-m", "workers.lab.bench.reads", str(path), *wrong]
        refused = subprocess.run(line, check=False, capture_output=True, text=True, timeout=WAIT)
        assert (refused.returncode, refused.stdout) == (2, "")
        assert why in refused.stderr
        assert "Traceback" not in refused.stderr
