"""What can go wrong between a client and the server, and how it is named on the wire.

ServingError                   a request that a server refused or lost
├── QueueFull                  too many requests wait already; try again later
├── DeadlineExceeded           the request's own deadline passed
├── AnswerCut                  an answer in mid-sentence was given up, but not by its reader
├── ProtocolMismatch           client and server speak different versions
└── ServerUnavailable          nobody answers, the connection was lost, or the server is stopping

A wrong parameter is `UsageError`, a prompt that does not fit its kind `ContextExceeded`, a dead ring
`RingError`, and a damaged store its kind `DamagedStore` (storage/errors.py), in a client just as in the
process that runs the ring.
"""

from __future__ import annotations

from storage.errors import DamagedStore, FlashringError, RingError, UsageError


class ServingError(FlashringError):
    pass


class QueueFull(ServingError):
    pass


class DeadlineExceeded(ServingError):
    pass


class AnswerCut(ServingError):
    pass


class ProtocolMismatch(ServingError):
    pass


class ServerUnavailable(ServingError):
    pass


class ContextExceeded(UsageError):
    """A prompt has more tokens than the context can hold."""


class RingGaveUp(RingError):
    """The ring died so often that it is not started again."""


USAGE, FULL, DEADLINE, RING, VERSION = "usage", "queue-full", "deadline", "ring", "version"
STOPPING, MALFORMED, HELLO, INTERNAL = "stopping", "malformed", "hello", "internal"
SLOW, CONTEXT, DAMAGED = "slow", "context", "damaged"

# Code on the wire → exception in the client; any other code is a plain ServingError.
BY_CODE: dict[str, type[FlashringError]] = {
    CONTEXT: ContextExceeded,
    USAGE: UsageError,
    FULL: QueueFull,
    DEADLINE: DeadlineExceeded,
    DAMAGED: DamagedStore,
    RING: RingError,
    VERSION: ProtocolMismatch,
    STOPPING: ServerUnavailable,
}


def code_of(error: FlashringError) -> str:
    """The code under which `error` travels; the most special class wins."""
    for code, kind in BY_CODE.items():
        if isinstance(error, kind):
            return code
    return INTERNAL


def from_code(code: str, message: str) -> FlashringError:
    """The exception that a client raises for an error of the server."""
    return BY_CODE.get(code, ServingError)(message)
