"""From the command line's options to a warm ring, for serving and embedding alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.config import Values, check_verify
from pipeline.first_dial import prepared
from pipeline.models.names import configure
from pipeline.planner.divide import plan
from pipeline.quality import check_word, describe
from pipeline.ring.plan import Plan
from pipeline.ring.session import Session
from pipeline.serving.chat import ChatTemplate
from pipeline.serving.warm_ring import WarmRing
from storage.errors import UsageError
from storage.store import Store


@dataclass(frozen=True, slots=True)
class OpenRing:
    """A warm ring, and what is worth telling about it."""

    ring: WarmRing
    name: str
    plan: Plan
    store: Store


def open_ring(
    model: str,
    memory: str = "",
    context: int = 0,
    config_file: Path | None = None,
    settings: Sequence[str] = (),
    chat_template: Path | None = None,
    reuse_prefix: bool = False,
    say: Callable[[str], None] = lambda line: None,
    bits: int | None = None,
    device: str = "",
    device_memory: str = "",
    quality: str = "",
    verify: str = "",
) -> OpenRing:
    """Find the model, divide the memory and start the ring; raises FlashringError.

    `say` gets a line for what its quality means, and for each death and restart of the ring.
    """
    values: Values = {
        "model": {"bits": bits},
        "predictor": {"quality": check_word(quality) or None},
        "storage": {"verify": check_verify(verify) or None},
        "memory": {"budget": memory or None},
        "compute": {
            "context": context or None,
            "device": device or None,
            "device_memory": device_memory or None,
        },
    }
    source, config = configure(model, config_file, settings, values)
    if "structured" not in config.compute.model_fields_set:  # whoever asks may ask for a form
        config = config.replace(compute={"structured": True})
    store = source.open_store()
    config = prepared(source, store, config)
    report = plan(store, config)
    if line := describe(store, report.config):
        say(line)
    template = _template(store, chat_template, say)

    def open_session() -> Session:
        session = Session(store, report.config, report.plan, budget=report.budget)
        session.reuse_prefix = reuse_prefix
        return session

    ring = WarmRing(open_session, template, report.config.sampling, say=say, state=store.state)
    return OpenRing(ring=ring, name=store.manifest.name, plan=report.plan, store=store)


def _template(store: Store, override: Path | None, say: Callable[[str], None]) -> ChatTemplate | None:
    """The chat template; one of the model's that cannot be used costs the chat, and nothing else."""
    try:
        return ChatTemplate.of_store(store.path, override)
    except UsageError as error:
        if override is not None:
            raise
        say(f"{store.manifest.name} answers no chat messages: {error}")
        return None
