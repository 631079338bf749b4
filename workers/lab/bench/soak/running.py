"""A `run.py serve` of one's own, over ZeroMQ and HTTP."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil

from pipeline.launch import ROOT, module_environment
from storage.errors import FlashringError

WORKERS = ("predictor", "cache", "prefetcher", "compute")
END_SECONDS = 300  # much more than it takes, of a machine that others use, too
AT = " at "  # between a model's name and where it is served


class Running:
    """The server's process, its addresses and what it said."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.lines: list[str] = []
        self.endpoint, self.url = self._address(), self._address()
        self._reader = threading.Thread(target=self._read, name="server-lines", daemon=True)
        self._reader.start()

    def _address(self) -> str:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line.rstrip())
            if line.startswith("serving ") and AT in line:
                return line.rpartition(AT)[2].strip()
        raise FlashringError(f"the server did not start: {' '.join(self.lines[-3:])}")

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line.rstrip())

    def workers(self) -> dict[str, psutil.Process]:
        """By name, as far as they live."""
        found = {}
        with contextlib.suppress(psutil.Error):
            for child in psutil.Process(self.process.pid).children():
                with contextlib.suppress(psutil.Error):
                    command = child.cmdline()
                    found.update({name: child for name in WORKERS if f"workers.{name}" in command})
        return found

    def kill(self, worker: str) -> bool:
        """Whether there was one to kill."""
        one = self.workers().get(worker)
        if one is None:
            return False
        one.kill()
        return True


@contextlib.contextmanager
def running(directory: Path, arguments: Sequence[str]) -> Iterator[Running]:
    """Serve until the block is left. Raises FlashringError where the server does not start, or end."""
    line = [sys.executable, str(ROOT / "run.py"), "serve", "--endpoint", f"ipc://{directory / 'ring.sock'}"]
    line += ["--http", "127.0.0.1:0", *arguments]
    environment = {**module_environment(), "TMPDIR": str(directory)}  # so that what is left there is ours
    with subprocess.Popen(line, env=environment, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield Running(process)
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(END_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                raise FlashringError(f"the server did not end within {END_SECONDS} s of SIGTERM") from None
