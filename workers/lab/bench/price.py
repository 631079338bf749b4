"""`python -m workers.lab.bench.price --model MODEL`: what a layer costs a token, everything in memory.

A ring decodes some tokens, and compute's own clocks tell how long attention and the FFN took, how long it
waited for the ring, and what was neither. Beside that stands what the kernels must read: the layer's
resident matrices, its keys and values, and the rows of its FFN that a token touches, at the rate of a plain
read of the memory, which is measured before and after. Prints one JSON object; milliseconds a layer, and of
the head a token, means over the tokens.
"""

from __future__ import annotations

from pipeline.status import waiting

from workers import kernels  # isort: skip  # before torch, for OpenMP's settings

import argparse
import json
import statistics
import sys
from dataclasses import asdict, dataclass

import numpy as np

from pipeline import ending
from pipeline.cores import thread_count
from pipeline.models.names import configure
from pipeline.planner.divide import plan
from pipeline.planner.work import MATRICES, kept_values
from pipeline.ring.counters import KEPT
from pipeline.ring.generation import Generation, GenerationParams
from pipeline.ring.session import Session
from storage.architecture import layer
from storage.codecs import CODECS
from storage.manifest import RESIDENT
from storage.store import Store
from storage.tensors import Tensors
from workers.lab.bench.job import TEXT
from workers.probe.memory import read_rate

_READ = 256 << 20  # bytes of one plain read
_READS = 9


@dataclass(frozen=True, slots=True)
class Price:
    """Milliseconds a layer, means over layers and tokens, but for those of a token."""

    tokens: int
    token: float  # milliseconds a token
    head: float  # milliseconds a token
    attention: float
    ffn: float
    waiting: float  # for the ring
    rest: float  # neither, per layer
    megabytes: float  # that the kernels of a layer must read
    reading: float  # them, at the rate of a plain read
    read_rate: float  # bytes a second

    @property
    def compute(self) -> float:
        """Of attention and FFN, what reading does not explain."""
        return self.attention + self.ffn - self.reading

    @property
    def ring(self) -> float:
        return self.waiting + self.rest


def of_generation(store: Store, done: Generation, rate: float, cache_itemsize: int) -> Price:
    """What a generation's tokens behind the first one cost; `rate` in bytes a second."""
    count, layers = len(done.tokens) - 1, len(store.layout.layers)
    token = 1e3 * statistics.fmean(np.diff(done.moments).tolist())

    def spent(phase: str) -> float:
        return 1e3 * done.delta("compute", f"{phase}_seconds") / count

    attention, ffn, waiting, head = (spent(phase) for phase in ("attention", "ffn", "waiting", "head"))
    position = len(done.prompt) + len(done.tokens) / 2
    size = _resident_bytes(store) + _touched_bytes(store, done, count)
    size += sum(kept_values(one, position) * cache_itemsize for one in store.architecture.layers)
    return Price(
        tokens=count,
        token=token,
        head=head,
        attention=attention / layers,
        ffn=ffn / layers,
        waiting=waiting / layers,
        rest=(token - attention - ffn - waiting - head) / layers,
        megabytes=size / layers / 1e6,
        reading=1e3 * size / layers / rate,
        read_rate=rate,
    )


def _resident_bytes(store: Store) -> int:
    """Of all layers' matrices that are not units."""
    file = Tensors(store.path / RESIDENT)
    names = (layer(index, f"{one}.weight") for index in range(len(store.layout.layers)) for one in MATRICES)
    return sum(file.place(name).bytes for name in names if name in file)


def _touched_bytes(store: Store, done: Generation, count: int) -> float:
    """Of units, a token: of those that decide the first row, and all rows of those that are active."""
    unit = store.layout.unit
    looked_up = sum(done.delta("cache", f"decode_{name}") for name in ("hits", "misses"))
    units = (looked_up + done.delta("compute", KEPT)) / count
    together = 1 if store.architecture.layers[0].ffn.router else unit.width  # experts are counted as such
    active = done.delta("compute", "active") / count / together
    deciding = unit.row_bytes(unit.rows[0].role)
    return units * deciding + active * (unit.bytes - deciding)


def measure(model: str, settings: list[str], prompt_tokens: int, tokens: int) -> Price:
    """Decode `tokens` behind a prompt, with everything in memory."""
    settings = ["cache.share=1", *settings]
    source, config = configure(model, None, settings, {})
    store = source.open_store()
    report = plan(store, config)
    threads = thread_count(report.config.compute.threads)
    words = np.ones(_READ // 4, np.float32)
    read_rate(words, threads)
    rates = [read_rate(words, threads) for _ in range(_READS)]
    with Session(store, report.config, report.plan) as session:
        prompt = session.encode(TEXT.read_text(encoding="utf-8"))[:prompt_tokens]
        for _ in session.generate(prompt, GenerationParams(max_new_tokens=tokens, ignore_eos=True)):
            pass
        assert session.last is not None
        done = session.last
    rates += [read_rate(words, threads) for _ in range(_READS)]
    itemsize = CODECS[report.plan.cache_dtype].bytes
    return of_generation(store, done, statistics.median(rates), itemsize)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m workers.lab.bench.price", description=__doc__)
    parser.add_argument("--model", default="", help="as the main command's")
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", dest="settings")
    given = parser.parse_args()
    with waiting("measuring"):
        price = measure(given.model, given.settings, given.prompt_tokens, given.tokens)
    print(json.dumps({**asdict(price), "compute": price.compute, "ring": price.ring}, indent=2))
    print(kernels.notes(), file=sys.stderr)


if __name__ == "__main__":
    sys.exit(ending.exit_status(main))
