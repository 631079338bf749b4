"""What a generation cost: the record that `--json` prints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

from pipeline.config import Config
from pipeline.ring.audit import AuditReport
from pipeline.ring.counters import ACCEPTED, DRAFTED, KEPT, STEPS, layer_and_name
from pipeline.ring.generation import Generation
from pipeline.ring.plan import Plan


@dataclass(frozen=True, slots=True)
class Seconds:
    """Where the time went."""

    load: float
    prefill: float
    decode: float


@dataclass(frozen=True, slots=True)
class Flash:
    """What was read from flash."""

    bytes_read: int
    reads: int
    bytes_per_token: float  # of decode
    prefill_bytes: int
    gap_bytes: int  # read by decode between bundles, and dropped


@dataclass(frozen=True, slots=True)
class CacheUse:
    """What decode found in DRAM, in neurons."""

    slots: int
    hits: int
    misses: int
    hit_rate: float  # 0 where nothing was looked up


@dataclass(frozen=True, slots=True)
class DraftUse:
    """Several tokens a step: a step that accepts drafts brings one token more than those."""

    steps: int  # of decode
    drafted: int
    accepted: int


@dataclass(frozen=True, slots=True)
class MemoryUse:
    """Of all processes together."""

    budget_bytes: int | None  # None: no budget was given
    peak_bytes: int


@dataclass(frozen=True, slots=True)
class WorkerId:
    """A worker process."""

    name: str
    pid: int


@dataclass(frozen=True, slots=True)
class Summary:
    """The cost of one completed generation."""

    text: str
    prompt_tokens: int
    generated_tokens: int
    finish_reason: str  # "stop", "length" or "cancelled"
    seconds: Seconds
    token_seconds: tuple[float, ...]  # from each token to the next
    tokens_per_second: float  # 0 for fewer than two tokens
    flash: Flash
    cache: CacheUse
    drafts: DraftUse
    memory: MemoryUse
    workers: tuple[WorkerId, ...]
    audit: AuditReport | None  # None: nothing was audited
    counters: dict[str, dict[str, float]]  # every worker's growth, without those of single layers
    notes: tuple[str, ...]  # what the workers chose, and why
    lossy: tuple[str, ...]  # the dials that are on, in words
    config: dict[str, Any]

    @classmethod
    def of(
        cls,
        done: Generation,
        plan: Plan,
        config: Config,
        *,
        load_seconds: float,
        memory: MemoryUse,
        pids: Mapping[str, int],
        notes: Sequence[str],
        lossy: Sequence[str],
    ) -> Summary:
        """Of a generation that has finished."""
        assert done.finished is not None
        tokens = len(done.tokens)
        decode = done.finished.decode_seconds
        return cls(
            text=done.text,
            prompt_tokens=len(done.prompt),
            generated_tokens=tokens,
            finish_reason=done.finished.reason,
            seconds=Seconds(load_seconds, done.finished.prefill_seconds, decode),
            token_seconds=tuple(round(later - earlier, 6) for earlier, later in pairwise(done.moments)),
            tokens_per_second=(tokens - 1) / decode if tokens > 1 and decode > 0 else 0.0,
            flash=_flash(done),
            cache=_cache(done, plan),
            drafts=DraftUse(*(int(done.delta("compute", name)) for name in (STEPS, DRAFTED, ACCEPTED))),
            memory=memory,
            workers=tuple(WorkerId(name, pid) for name, pid in pids.items()),
            audit=AuditReport.of(done.delta, plan.layers) if config.compute.audit else None,
            counters={
                worker: {name: done.delta(worker, name) for name in values if layer_and_name(name) is None}
                for worker, values in done.after.items()
            },
            notes=tuple(notes),
            lossy=tuple(lossy),
            config=config.model_dump(mode="json"),
        )

    def to_json(self) -> dict[str, Any]:
        """What `--json` prints, in its order."""
        return {
            **asdict(self),
            "token_seconds": list(self.token_seconds),
            "workers": [asdict(one) for one in self.workers],
            "audit": None if self.audit is None else self.audit.to_json(),
            "notes": list(self.notes),
            "lossy": list(self.lossy),
        }


def _flash(done: Generation) -> Flash:
    decoded = max(1, len(done.tokens) - 1)  # the first token comes out of the prefill
    bytes_decoded = done.delta("prefetcher", "decode_bytes")
    bytes_streamed = done.delta("prefetcher", "stream_bytes")
    return Flash(
        bytes_read=int(bytes_decoded + bytes_streamed),
        reads=int(done.delta("prefetcher", "decode_reads") + done.delta("prefetcher", "stream_reads")),
        bytes_per_token=bytes_decoded / decoded,
        prefill_bytes=int(bytes_streamed),
        gap_bytes=int(done.delta("prefetcher", "decode_gap_bytes")),
    )


def _cache(done: Generation, plan: Plan) -> CacheUse:
    hits = done.delta("cache", "decode_hits") + done.delta("compute", KEPT)
    misses = done.delta("cache", "decode_misses")
    return CacheUse(
        slots=plan.total_slots,
        hits=int(hits),
        misses=int(misses),
        hit_rate=hits / (hits + misses) if hits + misses else 0.0,
    )
