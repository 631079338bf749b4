"""What every worker process does around its own work.

A worker is started as `python -m workers.NAME`. Its standard input carries one length-prefixed
msgpack map, the `WorkerSpec`, and then stays open: its end-of-file means that the supervisor is
gone, and the worker leaves at once.
"""

from __future__ import annotations

import asyncio
import gc
import os
import shutil
import signal
import struct
import sys
import threading
import traceback
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import msgpack
import uvloop

from pipeline.config import Config
from pipeline.dials import with_fewer
from pipeline.ring import segments
from pipeline.ring.channel import Channel
from pipeline.ring.messages import PROTOCOL_VERSION, Failed, Unprepared, WorkerReady
from pipeline.ring.plan import Plan
from pipeline.ring.promptness import starting_prompt_threads
from pipeline.ring.timeline import Timeline
from storage.errors import FlashringError, StoreError, UsageError
from storage.store import Store

ORPHANED = 3  # exit status of a worker whose supervisor vanished
SELDOM = 50_000  # objects between two looks for garbage: by Python's 700 they took 5 % of the predictor


@dataclass(frozen=True, slots=True)
class WorkerSpec:
    """What the supervisor tells a worker at its start."""

    name: str
    directory: str  # of the ring's sockets
    store: str
    identity: str  # of that store's units: another in its place is refused
    config: dict[str, Any]
    plan: dict[str, Any]
    descriptors: dict[str, int]  # segment name → inherited file descriptor
    routes: dict[str, str]  # inbox → the inbox that gets its messages instead: taps that listen in
    compiles: bool = True  # kernels that are missing; else the worker is `Unprepared`

    def write(self, stream: BinaryIO) -> None:
        packed = msgpack.packb(asdict(self))
        stream.write(struct.pack("<I", len(packed)) + packed)
        stream.flush()

    @classmethod
    def read(cls, stream: BinaryIO) -> WorkerSpec:
        """Raises EOFError when the supervisor went away first."""
        header = stream.read(4)
        if len(header) < 4:
            raise EOFError("no worker specification on standard input")
        (size,) = struct.unpack("<I", header)
        return cls(**msgpack.unpackb(stream.read(size)))


@dataclass(frozen=True, slots=True)
class Worker:
    """A worker's view of its ring."""

    name: str
    channel: Channel
    store: Store
    config: Config
    plan: Plan
    segments: segments.Segments
    timeline: Timeline
    compiles: bool = True  # kernels that are missing

    def unprepared(self) -> None:
        """Tell the supervisor that kernels are missing; it will end this worker."""
        self.channel.send("supervisor", Unprepared(self.name))

    def ready(self, *notes: str) -> None:
        """Tell the supervisor that this worker can receive.

        What there is by now stays to the end: later collections of garbage need not look at it.
        """
        gc.freeze()
        gc.set_threshold(SELDOM)
        gc.enable()
        self.channel.send("supervisor", WorkerReady(self.name, os.getpid(), PROTOCOL_VERSION, notes))


def _leave_with_parent(stream: BinaryIO, directory: Path) -> None:
    """End this process when `stream` ends; the ring cannot go on without its supervisor.

    Nobody is left to remove the sockets' directory then, so the workers do.
    """

    def watch() -> None:
        # Past the buffered reader: its lock, held by a thread that waits, aborts the interpreter's end.
        while os.read(stream.fileno(), 1):
            pass
        shutil.rmtree(directory, ignore_errors=True)
        os._exit(ORPHANED)

    threading.Thread(target=watch, name="parent-watch", daemon=True).start()


def run_on_loop(
    name: str,
    inboxes: tuple[str, ...],
    main: Callable[[Worker], Awaitable[None]],
    channels: type[Channel] = Channel,
) -> None:
    """`run` for a worker that waits for several things: on a uvloop event loop."""
    run(name, inboxes, lambda worker: uvloop.run(_as_coroutine(main, worker)), channels)


def run(
    name: str,
    inboxes: tuple[str, ...],
    main: Callable[[Worker], None],
    channels: type[Channel] = Channel,
) -> None:
    """Run a worker's `main` to its end.

    `channels` is what it speaks through; only tests of faults want another one.

    An exception is reported to the supervisor as `Failed` and ends the process with status 1.
    """
    gc.disable()  # until it is ready nothing is garbage; looking takes a fifth of the kernels' start
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal's Ctrl-C is the supervisor's business
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    source = sys.stdin.buffer
    spec = WorkerSpec.read(source)
    _leave_with_parent(source, Path(spec.directory))
    plan, config = Plan.from_json(spec.plan), Config.parse(spec.config)
    with starting_prompt_threads():
        channel = channels(Path(spec.directory), inboxes, spec.routes)
    timeline = Timeline.wanted(Path(spec.directory).name, name)
    with channel:
        try:
            worker = Worker(
                name=name,
                channel=channel,
                store=with_fewer(_same_store(spec), config),
                config=config,
                plan=plan,
                segments=segments.attach(plan, spec.descriptors),
                timeline=timeline,
                compiles=spec.compiles,
            )
            main(worker)
        except Exception as error:
            known = isinstance(error, FlashringError)
            if not known:
                traceback.print_exc()
            sentence = str(error) if known else repr(error)
            channel.send("supervisor", _failure(name, error, sentence))
            sys.exit(1)
        finally:
            timeline.write()


def _same_store(spec: WorkerSpec) -> Store:
    """The store that the supervisor opened. Raises StoreError where another one lies there by now."""
    store = Store.open(Path(spec.store))
    if store.identity != spec.identity:
        raise StoreError(f"{store.path} was replaced by another store while it was in use: start again")
    return store


def _failure(name: str, error: Exception, sentence: str) -> Failed:
    return Failed(name, sentence, usage=isinstance(error, UsageError), damaged=isinstance(error, StoreError))


async def _as_coroutine(main: Callable[[Worker], Awaitable[None]], worker: Worker) -> None:
    stopped = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopped.set)
    work = asyncio.ensure_future(main(worker))
    waiting = asyncio.ensure_future(stopped.wait())
    await asyncio.wait({work, waiting}, return_when=asyncio.FIRST_COMPLETED)
    for task in (work, waiting):
        if not task.done():
            task.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    if work.done() and not work.cancelled():
        work.result()
