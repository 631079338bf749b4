"""Frozen records out of plain JSON data, with every type checked.

Written here because every process of a ring opens the store: pydantic takes 35 ms to prepare for the same.
"""

from __future__ import annotations

import math
import types
import typing
from collections.abc import Callable
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from typing import Any, TypeVar

Record = TypeVar("Record")
Read = Callable[[Any], Any]  # returns the value as the field's type, or raises ValueError


def read_record(kind: type[Record], data: Any) -> Record:
    """A dataclass from a JSON object.

    Raises ValueError for fields that are missing, unknown or of another type.
    """
    record: Record = _reader(typing.cast(Any, kind))(data)
    return record


@cache
def _reader(wanted: Any) -> Read:
    if is_dataclass(wanted):
        return _record_reader(typing.cast(type, wanted))
    if typing.get_origin(wanted) is not None:
        return _generic_reader(typing.get_origin(wanted), typing.get_args(wanted))
    if wanted is float:
        return _float
    return lambda value: of_type(wanted, value)


def _generic_reader(origin: Any, arguments: tuple[Any, ...]) -> Read:
    if origin is tuple:
        inner = _reader(arguments[0])
        return lambda value: tuple(inner(item) for item in _sequence(value))
    if origin is dict:
        key, item = _reader(arguments[0]), _reader(arguments[1])
        return lambda value: {key(name): item(one) for name, one in of_type(dict, value).items()}
    if origin is typing.Literal:
        return lambda value: _one_of(arguments, value)
    assert origin is types.UnionType, f"no field is a {origin}"
    some = [one for one in arguments if one is not type(None)]
    chosen = _reader(some[0]) if len(some) == 1 else _variant_reader(some)
    return lambda value: None if value is None else chosen(value)


def _variant_reader(kinds: list[Any]) -> Read:
    """One of several records, told apart by their constant field `kind`."""
    by_kind = {field.default: kind for kind in kinds for field in fields(kind) if field.name == "kind"}

    def read(value: Any) -> Any:
        return _reader(by_kind[_one_of(tuple(by_kind), of_type(dict, value).get("kind"))])(value)

    return read


def _record_reader(kind: type) -> Read:
    hints = typing.get_type_hints(kind)
    readers = {field.name: _reader(hints[field.name]) for field in fields(kind)}
    needed = {
        field.name for field in fields(kind) if field.default is MISSING and field.default_factory is MISSING
    }

    def read(value: Any) -> Any:
        given = of_type(dict, value)
        if wrong := [*sorted(needed - given.keys()), *sorted(given.keys() - readers.keys())]:
            raise ValueError(f"{kind.__name__} without, or with an unknown, {wrong[0]}")
        return kind(**{name: readers[name](one) for name, one in given.items()})

    return read


def of_type(wanted: type, value: Any) -> Any:
    """The value. Raises ValueError for one of another type."""
    if type(value) is not wanted:
        raise ValueError(f"{value!r:.40} where {wanted.__name__} was expected")
    return value


def _float(value: Any) -> float:
    """Whole numbers are taken, too."""
    try:
        number = float(value) if type(value) is int else of_type(float, value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"{value!r:.40} where a finite number was expected")
    return number


def _sequence(value: Any) -> Any:
    """A list, or the tuple that is one before it is written."""
    return value if type(value) is tuple else of_type(list, value)


def _one_of(known: tuple[Any, ...], value: Any) -> Any:
    if value not in known:
        raise ValueError(f"{value!r:.40} where one of {', '.join(map(str, known))} was expected")
    return value
