"""The predictor's process: hidden states in, predictions out."""

from __future__ import annotations

from collections.abc import Callable

from pipeline.ring.messages import HiddenReady, Message, RingReady
from pipeline.ring.process import Worker, run
from pipeline.ring.timeline import GUESSED, HEARD, PREDICTED
from workers.compute import compiling
from workers.loop import serve
from workers.predictor.prediction import Prediction
from workers.predictor.scorers import load_scorer

NAME = "predictor"


def answering(worker: Worker, prediction: Prediction) -> Callable[[Message], None]:
    """The handler of the ring's messages."""
    timeline = worker.timeline

    def handle(message: Message) -> None:
        match message:
            case HiddenReady():
                timeline.mark(HEARD, message.step.number, message.layer)
                for answer in prediction.handle(message):
                    event = GUESSED if answer.guess else PREDICTED
                    timeline.mark(event, answer.step.number, answer.layer)
                    worker.channel.send("cache", answer)
            case RingReady():
                return
            case _:
                raise TypeError(f"the predictor takes no {type(message).__name__}")

    return handle


def main(worker: Worker) -> None:
    """Answer messages until Stop."""
    needed = compiling.of_predictor(worker.plan.forecast.kind)
    if needed and not compiling.ready(needed, worker.store, worker.compiles):
        worker.unprepared()
        return
    scorer = load_scorer(worker.store, worker.config, worker.plan.forecast)
    prediction = Prediction(worker.plan, scorer, worker.segments.hidden, worker.segments.predicted)
    serve(worker, answering(worker, prediction), prediction.stats, *(scorer.notes if scorer else ()))


if __name__ == "__main__":
    run(NAME, (NAME,), main)
