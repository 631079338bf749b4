"""The codec of both protocols: a message is msgpack of `[tag, *fields]`.

A family of messages is the frozen, slotted dataclasses that derive from one base and carry a `TAG`.
Decoding checks tag, number and types of the fields; there is no pickle and no name on the wire. A field
may be a record, a dataclass of plain fields, which stand in its place.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, is_dataclass
from operator import attrgetter
from typing import Any, ClassVar, Generic, Protocol, TypeVar

import msgpack


class ProtocolError(Exception):
    """A frame that is not a message of this protocol."""


class Tagged(Protocol):
    """What the codec needs of a message."""

    TAG: ClassVar[int]


Kind = TypeVar("Kind", bound=Tagged)
Check = Callable[[Any], Any]  # returns the value as the field's type, or raises ProtocolError


@dataclass(frozen=True, slots=True)
class _Form(Generic[Kind]):
    """How one kind of message stands on the wire."""

    kind: type[Kind]
    values: Callable[[Kind], tuple[Any, ...]]  # all that follow the tag
    checks: tuple[Check, ...]  # of each value
    records: tuple[tuple[int, int, type[Any]], ...]  # field, width and type of the fields that are records
    containers: tuple[int, ...]  # values whose type alone does not tell whether they are right
    passed: set[tuple[type[Any], ...]]  # types of all values of messages that were right, and not converted

    @classmethod
    def of(cls, kind: type[Kind]) -> _Form[Kind]:
        names: list[str] = []
        wanted_types: list[Any] = []
        records: list[tuple[int, int, type[Any]]] = []
        for number, (name, wanted) in enumerate(_fields(kind)):
            if not (isinstance(wanted, type) and is_dataclass(wanted)):
                names.append(name)
                wanted_types.append(wanted)
                continue
            inner = list(_fields(wanted))
            names += [f"{name}.{part}" for part, _ in inner]
            wanted_types += [part for _, part in inner]
            records.append((number, len(inner), wanted))
        checks = tuple(_checker(wanted) for wanted in wanted_types)
        containers = tuple(
            place for place, wanted in enumerate(wanted_types) if typing.get_origin(wanted) in (tuple, dict)
        )
        return cls(kind, _reader(names), checks, tuple(records), containers, set())

    def message(self, values: list[Any]) -> Kind:
        """Raises ProtocolError for values of another number or type."""
        types = tuple(map(type, values))
        if types in self.passed:  # a call less for each value: they are dozens a layer
            checked = values
            for place in self.containers:
                checked[place] = self.checks[place](values[place])
        else:
            checked = self._checked(values)
            same = (new is old for new, old in zip(checked, values, strict=True))
            if all(one or place in self.containers for place, one in enumerate(same)):
                self.passed.add(types)
        for at, width, record in self.records:  # those before have become one value each
            checked[at : at + width] = [record(*checked[at : at + width])]
        return self.kind(*checked)

    def _checked(self, values: list[Any]) -> list[Any]:
        if len(values) != len(self.checks):
            raise ProtocolError(f"{self.kind.__name__} has {len(self.checks)} values, got {len(values)}")
        return [check(value) for check, value in zip(self.checks, values, strict=True)]


def _fields(kind: type[Any]) -> Iterator[tuple[str, Any]]:
    """Names and types, in their order."""
    hints = typing.get_type_hints(kind)
    return ((field.name, hints[field.name]) for field in fields(kind))


def _descendants(base: type[Kind]) -> Iterator[type[Kind]]:
    for kind in base.__subclasses__():
        yield kind
        yield from _descendants(kind)


def _reader(names: list[str]) -> Callable[[Any], tuple[Any, ...]]:
    """Gives the attributes of these names, as a tuple also of one or none."""
    if len(names) < 2:
        return lambda message: tuple(getattr(message, name) for name in names)
    return attrgetter(*names)


class Codec(Generic[Kind]):
    """Encodes and decodes the messages that derive from `base`; make it after the last of them."""

    def __init__(self, base: type[Kind]) -> None:
        self._by_tag: dict[int, _Form[Kind]] = {}
        for kind in _descendants(base):
            if "__slots__" not in vars(kind):
                continue  # the class that `slots=True` replaced, until it is collected
            if kind.TAG in self._by_tag:
                raise TypeError(f"two messages have tag {kind.TAG}")
            self._by_tag[kind.TAG] = _Form.of(kind)

    def encode(self, message: Kind) -> bytes:
        """`[tag, *fields]` as msgpack."""
        packed: bytes = msgpack.packb((message.TAG, *self._by_tag[message.TAG].values(message)))
        return packed

    def decode(self, frame: bytes) -> Kind:
        """Inverse of `encode`. Raises ProtocolError for anything else."""
        try:
            data = msgpack.unpackb(frame, strict_map_key=False)
        except (ValueError, TypeError, RecursionError, msgpack.exceptions.UnpackException) as error:
            raise ProtocolError(f"not msgpack: {error}") from error
        if not isinstance(data, list) or not data or type(data[0]) is not int or data[0] not in self._by_tag:
            raise ProtocolError("not a message of this protocol")
        return self._by_tag[data[0]].message(data[1:])


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
        if type(value) is wanted or wanted is Any:
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
