"""What joins the workers, and what stands before them.

Rooms: `ring` (the four processes and what they say to each other), `serving` (a warm ring for many clients),
`commands` (the command line). Read `ring/messages.py` first, then `ring/supervisor.py` and `ring/session.py`,
then `commands/generate.py`. What stands here itself prepares a ring: configuration, models, the plan.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipeline.serving.client import AsyncClient as AsyncClient
    from pipeline.serving.client import Client as Client
    from pipeline.serving.embed import Pipeline as Pipeline

PROJECT = "flashring"  # tells our package from another of the same name


def __getattr__(name: str) -> object:
    """`Pipeline`, `Client` and `AsyncClient`, imported when they are asked for: workers need none."""
    if name == "Pipeline":
        from pipeline.serving.embed import Pipeline

        return Pipeline
    if name in ("Client", "AsyncClient"):
        from pipeline.serving import client

        return getattr(client, name)
    raise AttributeError(f"module 'pipeline' has no attribute {name!r}")
