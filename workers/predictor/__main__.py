"""The predictor's process: hidden states in, predictions out."""

from __future__ import annotations

from collections.abc import Callable

from pipeline.planner import resolve
from pipeline.ring.messages import HiddenReady, Message, RingReady
from pipeline.ring.process import Worker, run
from workers.loop import serve
from workers.predictor.prediction import Prediction
from workers.predictor.scorer import Scorer
from workers.predictor.targets import Mode

NAME = "predictor"


def load_scorer(worker: Worker, kind: str, mode: Mode) -> Scorer | None:
    """The scorer of a resolved kind; None for `all`. Kernels are loaded only where they are used."""
    if kind == "oracle":
        from workers.predictor.oracle import Oracle

        return Oracle.load(worker.store)
    if kind == "lowrank":
        from workers.predictor import lowrank

        name, settings = worker.config.model.predictor, worker.config.predictor
        return lowrank.load(
            worker.store,
            name,
            mode.lookahead,
            mode.refines,
            settings.threshold,
            mode.pinned,
            settings.cache_aware,
        )
    return None


def answering(worker: Worker, prediction: Prediction) -> Callable[[Message], None]:
    """The handler of the ring's messages."""

    def handle(message: Message) -> None:
        match message:
            case HiddenReady():
                for answer in prediction.handle(message):
                    worker.channel.send("cache", answer)
            case RingReady():
                return
            case _:
                raise TypeError(f"the predictor takes no {type(message).__name__}")

    return handle


async def main(worker: Worker) -> None:
    """Answer messages until Stop."""
    resolved = resolve(worker.store, worker.config).predictor
    kind = resolved.kind
    plan = worker.plan
    mode = Mode(plan.layers, plan.lookahead, bool(resolved.refine), plan.pinned, kind == "all")
    scorer = load_scorer(worker, kind, mode)
    prediction = Prediction(mode, scorer, worker.segments.hidden, worker.segments.predicted)
    await serve(worker, answering(worker, prediction), prediction.stats, *(scorer.notes if scorer else ()))


if __name__ == "__main__":
    run(NAME, (NAME,), main)
