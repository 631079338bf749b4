"""Starting our own modules as processes, and refusing when other packages stand in their place."""

from __future__ import annotations

import importlib.util
import os
import select
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from pipeline.status import TICK_SECONDS, Status
from storage.errors import UsageError

PROGRAM = "FLASHRING_PROGRAM"  # in a program's environment: its name, as the user typed it
STARTED = "FLASHRING_STARTED"  # and a descriptor that it closes when its modules are imported
SERVE_EXTRA = "pip install -c constraints.txt -e '.[serve]'"  # in flashring's own directory
ROOT = Path(__file__).resolve().parent.parent  # where `pipeline`, `storage` and `workers` stand


def check_packages() -> None:
    """Raise UsageError when `storage` or `workers` would come from another project."""
    for name in ("pipeline", "storage", "workers"):
        spec = importlib.util.find_spec(name)
        found = Path(spec.origin).resolve() if spec is not None and spec.origin else None
        if found != ROOT / name / "__init__.py":
            raise UsageError(
                f"the package {name!r} is taken from {found.parent if found else 'nowhere'} instead of "
                f"{ROOT / name}: remove the other one, or run in an environment of its own"
            )


def module_command(module: str, *arguments: str) -> list[str]:
    """`python -m MODULE ARGUMENTS`, with this interpreter."""
    return [sys.executable, "-m", module, *arguments]


def module_environment() -> dict[str, str]:
    """The environment for `module_command`: only our packages, not ones in the caller's directory."""
    return os.environ | {"PYTHONPATH": str(ROOT), "PYTHONSAFEPATH": "1"}


def ask_module(module: str, *arguments: str, seconds: float) -> subprocess.CompletedProcess[str]:
    """Run a module to its end for what it prints. Raises subprocess.TimeoutExpired."""
    return subprocess.run(
        module_command(module, *arguments),
        env=module_environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )


def run_module(module: str, name: str, arguments: Sequence[str]) -> int:
    """Run a module to its end on this terminal; returns its exit status. `name`: what its help calls it.

    Ctrl-C reaches the child as well, which ends by itself; it is only waited for.
    """
    read_end, write_end = os.pipe()
    environment = module_environment() | {PROGRAM: name, STARTED: str(write_end)}
    with subprocess.Popen(
        module_command(module, *arguments), env=environment, pass_fds=(write_end,)
    ) as process:
        os.close(write_end)
        try:
            _tell_until_started(read_end, name)
            status = process.wait()
        except KeyboardInterrupt:
            process.terminate()
            process.wait()
            raise
        finally:
            os.close(read_end)
    return status if status >= 0 else 128 - status


def _tell_until_started(read_end: int, name: str) -> None:
    """While a program imports what it needs, which takes torch many seconds from a cold disk."""
    status = Status()
    while not select.select([read_end], [], [], TICK_SECONDS)[0]:
        status.tell(lambda: f"{name} is starting")
    status.clear()


def tell_started() -> None:
    """A program that `run_module` started is about to begin."""
    descriptor = os.environ.pop(STARTED, None)
    if descriptor is not None:
        os.close(int(descriptor))
