"""The predictor's process: hidden states in, predictions out."""

from __future__ import annotations

from collections.abc import Callable

from pipeline.ring.messages import HiddenReady, Message, RingReady
from pipeline.ring.process import Worker, run
from workers.loop import serve
from workers.predictor.prediction import Prediction
from workers.predictor.scorer import Scorer

NAME = "predictor"


def load_scorer(worker: Worker) -> Scorer | None:
    """The scorer of the plan's kind; None for `all`. Kernels are loaded only where they are used."""
    forecast = worker.plan.forecast
    if forecast.kind == "oracle":
        from workers.predictor.oracle import Oracle

        return Oracle.load(worker.store)
    if forecast.kind == "lowrank":
        from workers.predictor import lowrank

        config = worker.config
        return lowrank.load(worker.store, config.model.predictor, forecast, config.predictor.threshold)
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
    scorer = load_scorer(worker)
    prediction = Prediction(worker.plan, scorer, worker.segments.hidden, worker.segments.predicted)
    await serve(worker, answering(worker, prediction), prediction.stats, *(scorer.notes if scorer else ()))


if __name__ == "__main__":
    run(NAME, (NAME,), main)
