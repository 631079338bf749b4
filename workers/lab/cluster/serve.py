"""OpenAI's API from several rings: the server of `run.py serve --http` as replicas of Ray Serve.

    python -m workers.lab.cluster.serve --model opt-6.7b --memory 7GiB --replicas 4

Every replica is an actor with a ring, a queue and the endpoints of `pipeline/serving/http/api.py`. Proxies
give a request to the replica that has least to do.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline import program
from pipeline.commands.options import Context, Memory, Model, Settings
from pipeline.console import say
from pipeline.serving.endpoint import check_http
from pipeline.serving.fronts import check_http_packages
from workers.lab.cluster.ring import Cpus, RingOptions, start_ray, stop_ray

if TYPE_CHECKING:
    from starlette.applications import Starlette

WAITING = 64  # requests that may be on their way to one replica, as `run.py serve --queue`


def endpoints(options: RingOptions) -> Starlette:
    """The server of one replica; its ring begins and ends with the replica."""
    from starlette.applications import Starlette

    from pipeline.serving.http.api import Api
    from pipeline.serving.opening import open_ring
    from pipeline.serving.prometheus import PrometheusObserver
    from pipeline.serving.scheduler import Scheduler

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        opened = open_ring(options.model, options.memory, options.context, None, options.settings)
        observer = PrometheusObserver()
        scheduler = Scheduler(opened.ring, queue_limit=WAITING, observer=observer)
        observer.watch(scheduler)
        app.router.routes.extend(Api(scheduler, model=opened.name, context=opened.plan.context).routes())
        try:
            yield
        finally:
            await scheduler.stop()

    return Starlette(lifespan=lifespan)


def main(
    model: Model = "",
    memory: Memory = "",
    context_tokens: Context = 0,
    settings: Settings = None,
    replicas: Annotated[int, typer.Option(help="Rings.", min=1)] = 2,
    cpus: Cpus = 1.0,
    http: Annotated[
        str, typer.Option("--http", help="Where Serve listens, on this machine.", metavar="HOST:PORT")
    ] = "127.0.0.1:8000",
) -> None:
    """Serve OpenAI's API from several rings, by Ray Serve, until interrupted."""
    options = RingOptions(model, memory, context_tokens, tuple(settings or ()))
    resources = options.resources(cpus)
    host, port = check_http(http, "")
    check_http_packages()
    start_ray()
    from ray import serve

    try:
        serve.start(http_options={"host": host, "port": port})
        deployment = serve.deployment(
            serve.ingress(lambda: endpoints(options))(),
            num_replicas=replicas,
            max_ongoing_requests=WAITING,
            ray_actor_options=resources,
        )
        serve.run(deployment.bind(), name="flashring")
        say(f"serving {replicas} rings at http://{host}:{port}")
        threading.Event().wait()
    finally:
        serve.shutdown()
        stop_ray()


if __name__ == "__main__":
    sys.exit(program.single(main))
