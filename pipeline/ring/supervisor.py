"""Starts, watches and stops the four workers of one ring, and owns everything they share.

Any worker's death ends the ring: the four share state, and a half-alive ring would return wrong
text. Nothing is waited for without also watching the processes, and every wait has a bound.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, BinaryIO, cast

from pipeline.config import Config
from pipeline.console import say
from pipeline.directories import kernel_cache
from pipeline.launch import module_command, module_environment
from pipeline.ring import segments
from pipeline.ring.channel import Channel
from pipeline.ring.compiling import MissingKernels, compile_kernels
from pipeline.ring.limits import check_open_files, check_threads, explained, kills_for_memory, refused
from pipeline.ring.memory import PeakMemory
from pipeline.ring.messages import (
    PROTOCOL_VERSION,
    Failed,
    Message,
    ReportStats,
    RingReady,
    Stats,
    Stop,
    Unprepared,
    WorkerReady,
)
from pipeline.ring.plan import Plan
from pipeline.ring.process import WorkerSpec
from pipeline.status import waiting
from storage.errors import DamagedStore, RingError, UsageError
from storage.manifest import RESIDENT
from storage.store import Store

WORKERS = ("predictor", "cache", "prefetcher", "compute")
CONTROL_INBOX = {name: name for name in WORKERS} | {"compute": "control"}
HANDSHAKE_SECONDS = 120.0  # for starting the processes and all that they load, but for weights and slots
SLOW_DISK = 50e6  # bytes/s at which weights may come: a disk that turns, or one that is shared with others
SLOW_PAGES = 100e6  # bytes/s at which the kernel may find memory for slots; 0.3e9 and more were seen
STOP_SECONDS, TERMINATE_SECONDS, KILL_SECONDS = 0.6, 0.4, 2.0
WATCH_SECONDS = 0.05  # how often the processes are looked at while waiting for a message
# Where nobody else needs the cores, threads look for their next work for some time before they sleep: a
# token of SmolLM2-135M then takes 13 instead of 16.5 ms. Elsewhere they would take them from the readers.
AWAKE = {"GOMP_SPINCOUNT": "8000"}
OUT_OF_MEMORY = (
    "the kernel has ended a process for want of memory meanwhile; give --memory less, or the cgroup more"
)
DIRECTORY_PREFIX = "flashring-"
LONGEST_PARENT = 60  # bytes; a socket's whole path may have 107


class WorkerProcess:
    """One worker: its process, and its standard error for last words."""

    def __init__(
        self,
        name: str,
        descriptors: dict[str, int],
        settings: Mapping[str, str],
        program: Sequence[str] | None = None,
    ) -> None:
        """`settings` are added to the process's environment; `program` stands in for the worker's own."""
        self.name = name
        self._kills = kills_for_memory()
        self._errors: IO[bytes] | None = None
        environment = {**module_environment(), **settings}
        if not os.environ.get("FLASHRING_DEBUG"):
            self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed in close()
        try:
            self.process = subprocess.Popen(
                list(program or module_command(f"workers.{name}")),
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=self._errors,
                pass_fds=tuple(descriptors.values()),
                env=environment,
                process_group=0,  # the terminal's Ctrl-C reaches the supervisor alone
            )
        except OSError:
            if self._errors is not None:
                self._errors.close()
            raise

    @property
    def stdin(self) -> BinaryIO:
        return cast(BinaryIO, self.process.stdin)

    def epitaph(self) -> str:
        """How the process ended, and the last line that it wrote."""
        status = self.process.returncode
        how = (
            f"was killed by {signal.Signals(-status).name}" if status < 0 else f"exited with status {status}"
        )
        if status == -signal.SIGKILL and kills_for_memory() > self._kills:
            how += f": {OUT_OF_MEMORY}"
        words = self._last_words()
        return f"the {self.name} worker (pid {self.process.pid}) {how}" + (
            f": {explained(words)}" if words else ""
        )

    def _last_words(self) -> str:
        if self._errors is None:
            return ""
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        return lines[-1].strip() if lines else ""

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.stdin.close()
        if self._errors is not None:
            self._errors.close()


class Supervisor:
    """A running ring. Use as a context manager."""

    def __init__(
        self,
        store: Store,
        config: Config,
        plan: Plan,
        routes: Mapping[str, str] | None = None,
        programs: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        """Start the ring and wait until it is ready.

        `routes` makes the workers send to other inboxes than usual, so that somebody can listen in.
        Raises RingError when a worker dies, fails or stays silent, or when processes or shared memory
        cannot be had.
        """
        check_open_files()
        check_threads()
        cache, why = kernel_cache()
        if why:
            say(f"{why}: compiled kernels are kept in {cache}")
        self.notes: list[str] = []
        self.memory = PeakMemory([os.getpid()])
        self._serial = 0
        self._workers: list[WorkerProcess] = []
        sweep_stale_directories()
        self._routes = dict(routes or {})
        self._programs = dict(programs or {})
        self._channel: Channel | None = None
        try:
            self._bring_up(store, config, plan, compiles=False)
        except MissingKernels:
            peak = compile_kernels(store, config, plan)
            self._bring_up(store, config, plan, compiles=True)
            self.memory.bytes = max(self.memory.bytes, peak)
            self.notes.append("kernels: compiled before the start")

    def _bring_up(self, store: Store, config: Config, plan: Plan, compiles: bool) -> None:
        """Raises MissingKernels where the workers may not compile and would have to."""
        self.notes.clear()
        self.directory = _new_directory()
        # An interrupt in the middle of `stop` leaves it to the program's end.
        atexit.register(self._remove_directory)
        try:
            self.directory.mkdir(mode=0o700)
            self._channel = Channel(self.directory, ("supervisor",))
            self._start(store, config, plan, compiles)
            self.memory = PeakMemory([os.getpid(), *self.pids.values()])
            loading = store.manifest.files[RESIDENT].bytes / SLOW_DISK
            loading += plan.total_slots * plan.stride / SLOW_PAGES
            with waiting(f"the ring of {store.manifest.name} is starting"):
                self._handshake(HANDSHAKE_SECONDS + loading)
        except BaseException:
            self.stop()
            raise

    @property
    def pids(self) -> dict[str, int]:
        return {worker.name: worker.process.pid for worker in self._workers}

    def _start(self, store: Store, config: Config, plan: Plan, compiles: bool) -> None:
        try:
            descriptors = segments.create(plan)
        except OSError as error:
            raise refused(error, "shared memory") from error
        try:
            for name in WORKERS:
                try:
                    worker = WorkerProcess(
                        name, descriptors, AWAKE if plan.whole else {}, self._programs.get(name)
                    )
                except OSError as error:
                    raise refused(error, f"a process for the {name} worker") from error
                self._workers.append(worker)
                spec = WorkerSpec(
                    name=name,
                    directory=str(self.directory),
                    store=str(store.path.resolve()),
                    identity=store.identity,
                    config=config.model_dump(mode="json"),
                    plan=plan.to_json(),
                    descriptors=descriptors,
                    routes=self._routes,
                    compiles=compiles,
                )
                with contextlib.suppress(BrokenPipeError):  # a death that the handshake will name
                    spec.write(worker.stdin)
        finally:
            for descriptor in descriptors.values():
                os.close(descriptor)

    def _handshake(self, seconds: float) -> None:
        """Wait until all workers are ready. Raises RingError when they are not within `seconds`."""
        waiting = set(WORKERS)
        deadline = time.monotonic() + seconds
        while waiting:
            message = self.receive(deadline - time.monotonic())
            if message is None:
                raise RingError(
                    f"no sign of life from {' and '.join(sorted(waiting))} "
                    f"within {seconds:.0f} s of their start"
                )
            if isinstance(message, WorkerReady):
                if message.protocol != PROTOCOL_VERSION:
                    raise RingError(
                        f"the {message.name} worker speaks protocol {message.protocol}, "
                        f"this supervisor {PROTOCOL_VERSION}"
                    )
                waiting.discard(message.name)
                self.notes.extend(f"{message.name}: {note}" for note in message.notes)
        self.broadcast(RingReady())

    def send(self, worker: str, message: Message) -> None:
        """Raises RingError when the ring has been stopped."""
        if self._channel is None:
            raise RingError("the ring has been stopped")
        self._channel.send(CONTROL_INBOX[worker], message)

    def broadcast(self, message: Message) -> None:
        for name in WORKERS:
            self.send(name, message)

    def receive(self, timeout: float | None = None) -> Message | None:
        """The next message for the supervisor, or None after `timeout` seconds.

        Raises RingError as soon as a worker has died or reported a failure, DamagedStore where that is about
        what it read from the store, and UsageError where it says that
        something impossible was asked for: only workers know what the rooms of policies and scorers hold.
        """
        assert self._channel is not None
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            message = self._channel.receive("supervisor", WATCH_SECONDS)
            if isinstance(message, Failed):
                if message.usage:
                    raise UsageError(message.error)
                kind = DamagedStore if message.damaged else RingError
                raise kind(f"the {message.name} worker failed: {explained(message.error)}")
            if isinstance(message, Unprepared):
                raise MissingKernels
            if message is not None:
                return message
            self.check()
            self.memory.sample()
            if deadline is not None and time.monotonic() >= deadline:
                return None

    def check(self) -> None:
        """Raises RingError if a worker has died."""
        for worker in self._workers:
            if worker.process.poll() is not None:
                raise RingError(worker.epitaph())

    def ask_stats(self) -> int:
        """Ask every worker for its counters; they come as `Stats` of this serial among the other messages."""
        self._serial += 1
        self.broadcast(ReportStats(self._serial))
        return self._serial

    def stats(self, timeout: float = 10.0) -> dict[str, dict[str, float]]:
        """Every worker's counters. Only between generations: what an interrupted run says is dropped."""
        self.ask_stats()
        found: dict[str, dict[str, float]] = {}
        while len(found) < len(WORKERS):
            message = self.receive(timeout)
            if message is None:
                raise RingError(f"no statistics from {sorted(set(WORKERS) - set(found))}")
            if isinstance(message, Stats) and message.serial == self._serial:
                found[message.name] = message.values
        return found

    def stop(self) -> None:
        """End all workers within the bounds above and remove everything they shared."""
        try:
            self._end()
        finally:  # also where a second interrupt cuts the waiting short: workers leave with their supervisor
            for worker in self._workers:
                worker.close()
            self._workers.clear()
            if self._channel is not None:
                self._channel.close()
                self._channel = None
            self._remove_directory()

    def _remove_directory(self) -> None:
        shutil.rmtree(self.directory, ignore_errors=True)
        atexit.unregister(self._remove_directory)

    def _end(self) -> None:
        """Ask all workers to end, each time with more force, and wait."""
        if self._channel is not None:
            with contextlib.suppress(Exception):
                self.broadcast(Stop())
        self._wait(STOP_SECONDS)
        for ask, seconds in ((signal.SIGTERM, TERMINATE_SECONDS), (signal.SIGKILL, KILL_SECONDS)):
            for worker in self._workers:
                if worker.process.poll() is None:
                    worker.process.send_signal(ask)
            self._wait(seconds)

    def _wait(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        for worker in self._workers:
            with contextlib.suppress(subprocess.TimeoutExpired):
                worker.process.wait(max(0.0, deadline - time.monotonic()))

    def __enter__(self) -> Supervisor:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def _new_directory() -> Path:
    """Where this process's next sockets will lie: in /tmp where TMPDIR's path is too long."""
    parent = tempfile.gettempdir()
    if len(os.fsencode(parent)) > LONGEST_PARENT:
        parent = "/tmp"
    return Path(parent) / f"{DIRECTORY_PREFIX}{os.getpid()}-{secrets.token_hex(4)}"


def sweep_stale_directories() -> None:
    """Remove socket directories whose supervisor is gone; a SIGKILLed one cannot do it itself."""
    for path in Path(tempfile.gettempdir()).glob(f"{DIRECTORY_PREFIX}*-*"):
        pid = path.name.removeprefix(DIRECTORY_PREFIX).split("-")[0]
        if not pid.isdigit() or Path(f"/proc/{pid}").exists() or not Path("/proc/self").exists():
            continue
        with contextlib.suppress(OSError):
            if path.stat().st_uid == os.getuid():
                shutil.rmtree(path, ignore_errors=True)
