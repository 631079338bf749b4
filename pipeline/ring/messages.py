"""Every message of the ring, in the order in which one token sends them.

On the wire a message is msgpack of `[tag, *fields]`; `decode` checks tag, number and types of the
fields. PROTOCOL.md describes who sends what to whom and why. Bulk data never travels here: it is
in the shared segments of `segments.py`, at the row that (layer, part) names.

`run` numbers generations. `step` is a forward pass: a `Step` where it is said what for, else its number.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from pipeline.ring.codec import Codec
from pipeline.ring.codec import ProtocolError as ProtocolError  # noqa: PLC0414 - part of this protocol

PROTOCOL_VERSION = 4
EMBEDDING = -1  # as a layer: the new tokens' embedding, before any layer


@dataclass(frozen=True, slots=True)
class Step:
    """One forward pass, of tokens at positions `first` .. `first + count - 1`."""

    number: int  # over the ring's whole life; it is also residency's clock
    first: int
    count: int
    every: bool  # every neuron is computed (a prompt), and predictions say what to keep; else predicted sets


@dataclass(frozen=True, slots=True)
class Message:
    """Base of all messages."""

    TAG: ClassVar[int]


# -- start and stop --------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class WorkerReady(Message):
    """worker → supervisor: segments mapped, inbox bound, ready to work."""

    TAG = 1
    name: str
    pid: int
    protocol: int
    notes: tuple[str, ...]  # choices worth telling the user, such as the read backend and why


@dataclass(frozen=True, slots=True)
class RingReady(Message):
    """supervisor → every worker: all inboxes are bound, connect and begin."""

    TAG = 2


@dataclass(frozen=True, slots=True)
class Stop(Message):
    """supervisor → every worker: finish and exit with status 0."""

    TAG = 3


@dataclass(frozen=True, slots=True)
class Failed(Message):
    """worker → supervisor: the worker cannot go on; it exits after sending this."""

    TAG = 4
    name: str
    error: str  # one sentence
    usage: bool = False  # something impossible was asked for (UsageError); nothing is broken
    damaged: bool = False  # the store cannot be read, or is not what was written (StoreError)


@dataclass(frozen=True, slots=True)
class Unprepared(Message):
    """worker → supervisor: kernels are not compiled yet, which this worker was told not to do itself."""

    TAG = 5
    name: str


# -- one generation --------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Generate(Message):
    """supervisor → compute: decode after `prompt`."""

    TAG = 10
    run: int
    prompt: tuple[int, ...]  # token ids, at least one
    max_new_tokens: int
    temperature: float  # 0: greedy
    top_k: int  # 0: no limit
    top_p: float  # 1: no limit
    seed: int
    stop_tokens: tuple[int, ...]
    forced: tuple[int, ...]  # emitted instead of sampling, for benches and evaluation; may be empty
    cached: int = 0  # tokens of the prompt, below its length, whose keys and values the last run left
    grammar: str = ""  # what the answer must be, as the library llguidance reads it; empty: anything


@dataclass(frozen=True, slots=True)
class Cancel(Message):
    """supervisor → compute: end `run` at the next token, or between layers of its prefill."""

    TAG = 11
    run: int


# -- one layer, in ring order -----------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class HiddenReady(Message):
    """compute → predictor: the step's last `rows` hidden rows of `layer` are in the segment.

    `layer` is the layer whose FFN input this is, or EMBEDDING. Of a mixture the message also says which of
    the layer's experts are wanted, unless all are, or the cache has a say: those that the last `rows` rows
    chose come first, ascending, then the others, the most used first.
    """

    TAG = 20
    run: int
    step: Step
    layer: int
    rows: int  # the last window's tokens, or all where the step has fewer
    done: int  # every FFN with step · layers + layer <= done is finished: its leases end
    chosen: tuple[int, ...] = ()  # experts
    kept: int = 0  # how many of them the last rows chose


@dataclass(frozen=True, slots=True)
class NeuronsPredicted(Message):
    """predictor → cache: the neurons that `layer` will need.

    The segment's row (layer, guess) holds `certain` ids, then `doubtful` ones, or with `every` those to
    `keep`; each ascending. Without `every` the first `keep` of the certain ones are those to keep, and the
    others follow in the order in which they are worth it. With `experts.prefer` there are stand-ins among the
    certain ones, as ~id, and PROTOCOL.md says who is in the set. A `guess` only starts reads early: the set
    that is computed is the one that follows without it.
    """

    TAG = 21
    run: int
    step: Step
    layer: int
    guess: bool
    every: bool  # every neuron is wanted, and none of them is listed
    certain: int  # neurons that are wanted; stand-ins count, too
    doubtful: int  # neurons that are wanted only where they are resident
    keep: int | None  # of a prompt: neurons that should stay in slots afterwards; None: no matter which
    done: int

    @property
    def listed(self) -> int:
        """How many ids the row holds."""
        return (self.keep or 0) if self.every else self.certain + self.doubtful


@dataclass(frozen=True, slots=True)
class ReadBundles(Message):
    """cache → prefetcher: read `count` bundles, listed at `start` of the layer's read table."""

    TAG = 22
    run: int
    step: Step
    layer: int
    part: int
    start: int
    count: int
    guess: bool  # nobody waits for it yet: it gives way to other reads


@dataclass(frozen=True, slots=True)
class LayerPart(Message):
    """cache (part 0) and prefetcher (all others) → compute: a part's bundles are in their slots.

    Part 0 carries the schedule of the layer: how many neurons each part has in the layer's table of
    wanted ones, and which parts close a group. A group's neurons are summed, in ascending id, when
    its closing part is there; groups ascend. A part that used staging is answered by `PartDone`.
    """

    TAG = 23
    run: int
    step: int
    layer: int
    part: int
    counts: tuple[int, ...]  # part 0 only: neurons of every part of this layer
    closes: tuple[bool, ...]  # part 0 only: whether the part ends a group
    staged: bool  # part 0 only: every closing part is answered by PartDone


@dataclass(frozen=True, slots=True)
class PartDone(Message):
    """compute → cache: the staging half of this part is free again."""

    TAG = 24
    run: int
    step: int
    layer: int
    part: int


# -- results ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class TokenReady(Message):
    """compute → supervisor: one more token."""

    TAG = 30
    run: int
    index: int  # 0 for the first generated token
    token: int
    logprob: float  # natural log of the token's probability at temperature 1, before top-k and top-p


@dataclass(frozen=True, slots=True)
class Finished(Message):
    """compute → supervisor: the run is over and the ring is drained."""

    TAG = 31
    run: int
    reason: str  # "stop", "length", "cancelled" or "failed"
    prefill_seconds: float
    decode_seconds: float
    error: str = ""  # of "failed": why the grammar cannot be followed, in one sentence


@dataclass(frozen=True, slots=True)
class ReportStats(Message):
    """supervisor → any worker: answer with `Stats`."""

    TAG = 32
    serial: int


@dataclass(frozen=True, slots=True)
class Stats(Message):
    """worker → supervisor: counters since start; names are each worker's own."""

    TAG = 33
    serial: int
    name: str
    values: dict[str, float]


_CODEC = Codec(Message)
encode = _CODEC.encode  # Message → `[tag, *fields]` as msgpack
decode = _CODEC.decode  # the inverse; raises ProtocolError for anything else
