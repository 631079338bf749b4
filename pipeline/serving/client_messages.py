"""Every message between a client and the server, in the order of one request.

PROTOCOL.md, "Clients", says who sends what and when. On the wire a message is one ZeroMQ frame:
msgpack of `[tag, *fields]`, as in the ring (codec.py). `request` is a number that the client
chooses; every answer carries it back.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from pipeline.ring.codec import Codec

CLIENT_PROTOCOL_VERSION = 1
NO_REQUEST = -1  # in Error: not about one request
CANCELLED = "cancelled"  # the reason of an answer that was cut because its client wanted so


@dataclass(frozen=True, slots=True)
class ClientMessage:
    """Base of all messages between clients and the server."""

    TAG: ClassVar[int]


# -- greeting ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Hello(ClientMessage):
    """client → server: the first message of a connection."""

    TAG = 1
    protocol: int
    client: str  # name and version, for the server's log


@dataclass(frozen=True, slots=True)
class Welcome(ClientMessage):
    """server → client: the versions agree; requests may come."""

    TAG = 2
    protocol: int
    server: str
    model: str
    context: int  # tokens of prompt and answer together
    heartbeat: float  # seconds between signs of life while a request is open
    max_message: int  # bytes; a larger frame closes the connection
    chat: bool  # whether the model has a chat template


# -- one request ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Submit(ClientMessage):
    """client → server: generate. Exactly one of prompt, tokens and messages is not empty.

    None: what the configuration of the served model says.
    """

    TAG = 10
    request: int
    prompt: str | None
    tokens: tuple[int, ...]  # token ids
    # {"role": …, "content": …} and what else the chat template knows, such as "tool_calls"; empty: not given
    messages: tuple[dict[str, Any], ...]
    max_new_tokens: int | None
    temperature: float | None  # 0: greedy
    top_k: int | None  # 0: no limit
    top_p: float | None  # 1: no limit
    seed: int
    stop: tuple[str, ...]  # the answer ends before the first of these
    ignore_eos: bool
    deadline: float  # seconds from the server's receipt, waiting included; 0: the server's limit


@dataclass(frozen=True, slots=True)
class SubmitStructured(Submit):
    """client → server: a `Submit` whose answer must be JSON of a schema."""

    TAG = 16
    json_schema: str  # JSON


@dataclass(frozen=True, slots=True)
class Cancel(ClientMessage):
    """client → server: end `request` at the next token; it is answered by Done("cancelled")."""

    TAG = 11
    request: int


@dataclass(frozen=True, slots=True)
class Waiting(ClientMessage):
    """server → client: the request is alive; sent on acceptance and at every heartbeat."""

    TAG = 12
    request: int
    position: int  # requests that come before it; 0: it runs


@dataclass(frozen=True, slots=True)
class Token(ClientMessage):
    """server → client: one more token."""

    TAG = 13
    request: int
    index: int  # 0 for the first
    token: int | None  # None: text that was held back (a character or a stop string in the making)
    text: str  # may be empty, for the same reason
    logprob: float  # natural logarithm, at temperature 1


@dataclass(frozen=True, slots=True)
class Done(ClientMessage):
    """server → client: the request is answered."""

    TAG = 14
    request: int
    reason: str  # "stop" (end-of-text token or stop string), "length", "cancelled"
    prompt_tokens: int
    generated_tokens: int
    cached_tokens: int  # of the prompt's tokens, those whose keys and values were still there
    queue_seconds: float
    prefill_seconds: float
    decode_seconds: float


@dataclass(frozen=True, slots=True)
class Error(ClientMessage):
    """server → client: the request (or, with NO_REQUEST, a frame) was refused or failed."""

    TAG = 15
    request: int
    code: str  # errors.py
    message: str  # one sentence


# -- the server itself ------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class AskStats(ClientMessage):
    """client → server: answer with `ServerStats`."""

    TAG = 20
    request: int


@dataclass(frozen=True, slots=True)
class ServerStats(ClientMessage):
    """server → client: counters since the server's start, and those of the ring's workers."""

    TAG = 21
    request: int
    values: dict[str, float]


@dataclass(frozen=True, slots=True)
class AskHealth(ClientMessage):
    """client → server: answer with `Health`; allowed before Hello."""

    TAG = 22
    request: int


@dataclass(frozen=True, slots=True)
class Health(ClientMessage):
    """server → client: whether requests are served."""

    TAG = 23
    request: int
    status: str  # "ready", "busy", "restarting" (the ring), "damaged" (the store), "stopping"
    waiting: int  # requests in the queue


_CODEC = Codec(ClientMessage)
encode = _CODEC.encode
decode = _CODEC.decode
