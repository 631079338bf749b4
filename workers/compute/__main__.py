"""The compute process: control on the event loop, the layer loop in a thread."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Callable
from typing import Any

from pipeline.cores import thread_count
from pipeline.planner.drafting import draft_store
from pipeline.ring.messages import Cancel, Generate, Message, ReportStats, Stats, Stop
from pipeline.ring.plan import HOST
from pipeline.ring.process import Worker, run_on_loop
from pipeline.ring.promptness import starting_prompt_threads
from storage.codecs import CODECS, Codec
from storage.shadow import Shadow
from storage.store import Store
from workers import kernels
from workers.compute import compiling
from workers.compute.audit import Audit
from workers.compute.bound import Source
from workers.compute.constraint import Constraints
from workers.compute.cpu import shadow as low_bits
from workers.compute.cpu.device import CpuDevice
from workers.compute.cpu.shadow import CpuShadow
from workers.compute.device import Device
from workers.compute.drafts.lookup import Lookup
from workers.compute.drafts.model import ModelDrafts
from workers.compute.drafts.source import Source as Drafting
from workers.compute.engine import Engine
from workers.compute.ring_units import Stopped
from workers.compute.weights import Vectors, Weights

NAME = "compute"


class LayerLoop:
    """The engine's thread: takes requests from a queue until it is told to end."""

    def __init__(
        self,
        worker: Worker,
        weights: Source,
        device: Device[Any],
        threads: int,
        drafts: Drafting,
        shadow: CpuShadow | None,
    ) -> None:
        self._threads = threads
        self._requests: queue.SimpleQueue[Generate | None] = queue.SimpleQueue()
        with starting_prompt_threads():
            self._channel = type(worker.channel)(worker.channel.directory, (NAME,), worker.channel.routes)
        every = worker.config.compute.audit
        audit = Audit(worker.store, weights, every) if every and worker.store.architecture.sparse else None
        constraints = Constraints(worker.store)
        self.engine = Engine(
            weights.architecture,
            device,
            worker.plan,
            worker.segments,
            self._channel,
            audit,
            constraints,
            worker.timeline,
            shadow,
            drafts,
            even_forced=worker.config.drafts.kind != "auto",
            hits_first=worker.config.cache.hits_first,
        )
        self.ended: asyncio.Future[object] = asyncio.get_running_loop().create_future()
        self._loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._work, name="layers")

    def start(self) -> None:
        self._thread.start()

    def submit(self, request: Generate) -> None:
        self._requests.put(request)

    def _work(self) -> None:
        error: BaseException | None = None
        kernels.start_threads(self._threads)
        try:
            while (request := self._requests.get()) is not None:
                self.engine.generate(request)
        except Stopped:
            pass
        except Exception as problem:
            error = problem
        finally:
            self._channel.close()
        self._loop.call_soon_threadsafe(self._settle, error)

    def _settle(self, error: BaseException | None) -> None:
        if self.ended.done():
            return
        if error is None:
            self.ended.set_result(None)
        else:
            self.ended.set_exception(error)

    def close(self) -> None:
        """End the thread; idempotent."""
        self.engine.stop()
        self._requests.put(None)
        self._thread.join()
        self.engine.close()


async def main(worker: Worker) -> None:
    """Serve control messages until `Stop`, or until the layer loop fails."""
    threads = thread_count(worker.config.compute.threads)
    kernels.ACTIVATIONS.exact = worker.config.compute.activations == "exact"
    cache_codec = CODECS[worker.plan.cache_dtype]
    where = worker.config.compute.device
    kind: Callable[[Store, bool], Source] = Weights if where in HOST else Vectors.of
    verified = worker.config.storage.verify != "off"
    reading = asyncio.get_running_loop().run_in_executor(None, kind, worker.store, verified)
    drafting = draft_store(worker.config)
    for store in (worker.store, drafting) if drafting else (worker.store,):
        own = store is worker.store
        of = (worker.plan.forecast.kind, where) if own else ("all", "cpu")
        needed = compiling.of_compute(store, cache_codec.name, *of)
        if not compiling.ready(needed, store, worker.compiles):  # while the disk works
            worker.unprepared()
            return
    weights = await reading
    device, notes = _device(worker, weights, threads, cache_codec)
    shadow, forecast = None, worker.plan.forecast
    if forecast.shadowed:
        shadow = CpuShadow(weights, low_bits.read(Shadow.open(worker.store)), forecast, threads)
    loop = LayerLoop(worker, weights, device, threads, _drafts(worker, drafting, threads), shadow)
    stopped = asyncio.Event()

    def handle(message: Message) -> None:
        match message:
            case Generate():
                loop.submit(message)
            case Cancel():
                loop.engine.cancel(message)
            case ReportStats():
                worker.channel.send("supervisor", Stats(message.serial, NAME, _values(loop.engine, device)))
            case Stop():
                stopped.set()
            case _:
                pass

    loop.start()
    worker.channel.on_message("control", handle)
    worker.ready(*notes, f"{threads} threads")
    waiting: asyncio.Future[object] = asyncio.ensure_future(stopped.wait())
    try:
        await asyncio.wait({waiting, loop.ended}, return_when=asyncio.FIRST_COMPLETED)
        if loop.ended.done():
            loop.ended.result()
    finally:
        waiting.cancel()
        loop.close()


def _drafts(worker: Worker, drafting: Store | None, threads: int) -> Drafting:
    """What drafts come from, if the plan wants any."""
    if drafting is None:
        return Lookup()
    vocabulary, plan = worker.store.architecture.vocabulary, worker.plan
    return ModelDrafts(drafting, vocabulary, plan.context, threads, CODECS[plan.cache_dtype])


def _device(
    worker: Worker, source: Source, threads: int, cache_codec: Codec
) -> tuple[Device[Any], list[str]]:
    """What the configuration's `compute.device` names, and notes on it."""
    plan, where = worker.plan, worker.config.compute.device
    if where == "cpu":
        return CpuDevice(source, plan.context, threads, cache_codec), [kernels.notes()]
    from workers.compute.torch.making import make  # only here: importing torch takes 220 MiB

    device, problem = make(where, source, plan, threads, cache_codec, worker.segments.bundles)
    return device, [f"device {where}", *([problem] if problem else [])]


def _values(engine: Engine, device: Device[Any]) -> dict[str, float]:
    """Totals since the start: seconds by phase, tokens, what the device counts."""
    # list(): the layer loop may add a key meanwhile.
    seconds = {f"{phase}_seconds": value for phase, value in list(engine.seconds.items())}
    values = {**seconds, **dict(list(engine.counts.items()))}
    for name, value in device.counters().items():
        values[name] = values.get(name, 0.0) + value
    return values


if __name__ == "__main__":
    run_on_loop(NAME, ("control",), main)
