"""What this machine does, measured once and kept: `pace.Rates`, by a probe in a process of its own.

`$FLASHRING_HOME/machine.json` keeps it, of each disk apart. It is measured again where processor, cores or
versions have changed, and when someone asks.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any, Final

from pipeline import directories
from pipeline.cores import cores
from pipeline.launch import ask_module
from pipeline.models import shelf
from pipeline.planner.pace import Kernel, Rates
from pipeline.status import waiting
from pipeline.version import version
from storage.errors import FlashringError, UsageError, reason
from storage.files import write_whole
from storage.manifest import BUNDLES

PROBE: Final = "workers.probe"
CODECS: Final = ("float16", "bfloat16", "q8", "q4")  # what presets have in 16, 8 and 4 bits
PATIENCE: Final = 600.0  # seconds: kernels may have to be compiled
LARGE: Final = 64 << 20  # bytes of a file that is worth reading
WRITTEN: Final = 256 << 20  # bytes of one that is written where there is none
FORMAT: Final = 3
BUSY: Final = 0.15  # of the processors, from which on others have made a measurement too slow


class ProbeFailed(FlashringError):
    """The probe did not end well; the text is its last words."""


@dataclass(frozen=True, slots=True)
class Kept:
    """The file's content."""

    machine: dict[str, Any] = field(default_factory=dict)  # which machine it is of
    memory: dict[str, Any] = field(default_factory=dict)
    kernels: dict[str, dict[str, float]] = field(default_factory=dict)
    disks: dict[str, dict[str, Any]] = field(default_factory=dict)  # by the device's number
    others: float = 0.0  # share of the processors that other programs took meanwhile

    @property
    def whole(self) -> bool:
        return bool(self.memory and self.kernels)


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    return {
        "format": FORMAT,
        "processor": processor(),
        "cores": cores(),
        "system": platform.release(),
        "numba": version("numba"),
    }


def processor() -> str:
    """Its name, as the system has it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def measured(
    place: Path | None = None,
    codecs: tuple[str, ...] = CODECS,
    *,
    renew: bool = False,
    say: Callable[[str], None] = lambda _: None,
) -> Rates:
    """This machine's, and of the disk that holds `place` (None: the converted stores'), measured if need be.

    Raises ProbeFailed, UsageError, OSError.
    """
    place = place or directories.home()
    kept = Kept() if renew else _read()
    if kept.machine != machine():
        kept = Kept(machine())
    device = str(_device(place))
    missing = tuple(name for name in codecs if name not in kept.kernels)
    disk_missing = device not in kept.disks
    if missing or disk_missing:
        say("measuring this machine for some seconds, once (kernels may have to be compiled first)")
        with waiting("measuring this machine"):
            kept = _renewed(kept, device, place, missing, disk_missing=disk_missing)
        _write(kept)
    if kept.others > BUSY:
        say(
            f"other programs took {kept.others:.0%} of the processors while this machine was measured, so "
            f"everything is quicker than told here: `run.py plan --probe` measures again"
        )
    return rates(kept, device)


def rates(kept: Kept, device: str) -> Rates:
    """As the model of time takes them."""
    disk = kept.disks[device]
    return Rates(
        cores=int(kept.machine["cores"]),
        read=float(kept.memory["read"]),
        kernels={name: Kernel(**one) for name, one in kept.kernels.items()},
        launch=float(kept.memory["launch"]),
        hop=float(kept.memory["hop"]),
        scoring=float(kept.memory["scoring"]),
        arithmetic=float(kept.memory["arithmetic"]),
        disk=tuple((int(size), float(rate)) for size, rate in disk["rates"]),
        stream=float(disk["stream"]),
        latency=float(disk["latency"]),
    )


def known(place: Path) -> Rates | None:
    """What was measured before of this machine and of the disk that holds `place`; None: nothing."""
    kept, device = _read(), str(_device(place))
    if kept.machine != machine() or not kept.whole or device not in kept.disks:
        return None
    return rates(kept, device)


def to_json(found: Rates) -> dict[str, Any]:
    """For programs."""
    return asdict(found)


def kept_at() -> Path:
    return directories.home() / "machine.json"


def _renewed(kept: Kept, device: str, place: Path, codecs: tuple[str, ...], *, disk_missing: bool) -> Kept:
    parts = [*(["disk"] if disk_missing else []), *(["memory"] if codecs else [])]
    with _file(place) as file:
        line = [str(file), "--parts", ",".join(parts), "--codecs", ",".join(codecs or CODECS[:1])]
        found = _run(line)
    disks = {**kept.disks, **({device: found["disk"]} if disk_missing else {})}
    others = max(kept.others, found["others"])
    if not codecs:
        return Kept(kept.machine, kept.memory, kept.kernels, disks, others)
    memory = {name: found[name] for name in ("read", "launch", "scoring", "arithmetic", "hop")}
    return Kept(kept.machine, memory, {**kept.kernels, **found["kinds"]}, disks, others)


def _run(line: list[str]) -> dict[str, Any]:
    try:
        done = ask_module(PROBE, *line, seconds=PATIENCE)
        found: dict[str, Any] = json.loads(done.stdout)
    except subprocess.TimeoutExpired as error:
        raise ProbeFailed(f"this machine could not be measured within {PATIENCE:.0f} s") from error
    except ValueError as error:
        words = done.stderr.strip().splitlines()[-1:] or [f"its status is {done.returncode}"]
        raise ProbeFailed(
            f"this machine could not be measured: {words[0].removeprefix('flashring: ')}"
        ) from error
    return found


def _device(place: Path) -> int:
    """The number of the device that holds a place, which need not be there yet."""
    there = next(one for one in (place, *place.absolute().parents) if one.exists())
    return there.stat().st_dev


@contextmanager
def _file(place: Path) -> Iterator[Path]:
    """A large file on the disk of `place`: a store's, or one that is written, and gone afterwards."""
    number = _device(place)
    stores = [place, *(one.path for one in shelf.kept())]
    bundles = [one / BUNDLES for one in stores if (one / BUNDLES).is_file()]
    sizes = {one: one.stat().st_size for one in bundles if one.stat().st_dev == number}
    largest = max(sizes, key=sizes.__getitem__, default=None)
    if largest is not None and sizes[largest] >= LARGE:
        yield largest
        return
    there = next(one for one in (place, *place.absolute().parents) if one.is_dir())
    try:
        with NamedTemporaryFile(dir=there, prefix=".flashring-probe-") as file:
            block = os.urandom(1 << 20)
            for _ in range(WRITTEN // len(block)):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
            yield Path(file.name)
    except OSError as error:
        raise UsageError(f"the disk of {there} cannot be measured: {reason(error)}") from error


def _read() -> Kept:
    try:
        return Kept(**json.loads(kept_at().read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return Kept()


def _write(kept: Kept) -> None:
    """Without it the next plan measures again."""
    with contextlib.suppress(OSError):
        kept_at().parent.mkdir(parents=True, exist_ok=True)
        write_whole(kept_at(), json.dumps(asdict(kept), indent=1).encode())
