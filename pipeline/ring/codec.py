"""The codec of both protocols: a message is msgpack of `[tag, *fields]`.

A family of messages is the frozen, slotted dataclasses that derive from one base and carry a `TAG`.
Decoding checks tag, number and types of the fields; there is no pickle and no name on the wire.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Callable
from dataclasses import fields
from typing import Any, ClassVar, Generic, Protocol, TypeVar

import msgpack


class ProtocolError(Exception):
    """A frame that is not a message of this protocol."""


class Tagged(Protocol):
    """What the codec needs of a message."""

    TAG: ClassVar[int]


Kind = TypeVar("Kind", bound=Tagged)
Check = Callable[[Any], Any]  # returns the value as the field's type, or raises ProtocolError


class Codec(Generic[Kind]):
    """Encodes and decodes the messages that derive from `base`; make it after the last of them."""

    def __init__(self, base: type[Kind]) -> None:
        self._by_tag: dict[int, type[Kind]] = {}
        self._names: dict[type[Kind], tuple[str, ...]] = {}
        self._checks: dict[int, tuple[Check, ...]] = {}
        for kind in base.__subclasses__():
            if "__slots__" not in vars(kind):
                continue  # the class that `slots=True` replaced, until it is collected
            if kind.TAG in self._by_tag:
                raise TypeError(f"two messages have tag {kind.TAG}")
            hints = typing.get_type_hints(kind)
            names = tuple(field.name for field in fields(typing.cast(Any, kind)))
            self._by_tag[kind.TAG] = kind
            self._names[kind] = names
            self._checks[kind.TAG] = tuple(_checker(hints[name]) for name in names)

    def encode(self, message: Kind) -> bytes:
        """`[tag, *fields]` as msgpack."""
        names = self._names[type(message)]
        packed: bytes = msgpack.packb([message.TAG, *[getattr(message, name) for name in names]])
        return packed

    def decode(self, frame: bytes) -> Kind:
        """Inverse of `encode`. Raises ProtocolError for anything else."""
        try:
            data = msgpack.unpackb(frame, strict_map_key=False)
        except (ValueError, TypeError, RecursionError, msgpack.exceptions.UnpackException) as error:
            raise ProtocolError(f"not msgpack: {error}") from error
        if not isinstance(data, list) or not data or type(data[0]) is not int or data[0] not in self._by_tag:
            raise ProtocolError("not a message of this protocol")
        kind = self._by_tag[data[0]]
        checks = self._checks[data[0]]
        if len(data) - 1 != len(checks):
            raise ProtocolError(f"{kind.__name__} has {len(checks)} fields, got {len(data) - 1}")
        return kind(*[check(value) for check, value in zip(checks, data[1:], strict=True)])


def _checker(wanted: Any) -> Check:
    """The check of one field, made once: a token passes through dozens of messages."""
    origin = typing.get_origin(wanted)
    arguments = typing.get_args(wanted)
    if origin is tuple:
        return _tuple_checker(_checker(arguments[0]))
    if origin is dict:
        return _map_checker(_checker(arguments[0]), _checker(arguments[1]))
    if origin is types.UnionType:
        return _union_checker(arguments)
    return _scalar_checker(wanted)


def _scalar_checker(wanted: type) -> Check:
    def check(value: Any) -> Any:
        if type(value) is wanted:
            return value
        if wanted is float and type(value) is int:
            return float(value)
        raise ProtocolError(f"expected {wanted.__name__}, got {type(value).__name__}")

    return check


def _tuple_checker(inner: Check) -> Check:
    def check(value: Any) -> Any:
        if type(value) is not list:
            raise ProtocolError(f"expected a list, got {type(value).__name__}")
        return tuple([inner(item) for item in value])

    return check


def _map_checker(key: Check, inner: Check) -> Check:
    def check(value: Any) -> Any:
        if type(value) is not dict:
            raise ProtocolError(f"expected a map, got {type(value).__name__}")
        return {key(name): inner(item) for name, item in value.items()}

    return check


def _union_checker(options: tuple[type, ...]) -> Check:
    def check(value: Any) -> Any:
        if type(value) in options:
            return value
        if float in options and type(value) is int:
            return float(value)
        names = " or ".join(option.__name__ for option in options)
        raise ProtocolError(f"expected {names}, got {type(value).__name__}")

    return check
