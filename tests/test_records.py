"""Records from JSON data: every field is there, known and of its type."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import pytest

from storage.records import read_record


@dataclass(frozen=True, slots=True)
class Inner:
    kind: Literal["a", "b"]
    size: float = 1.0


@dataclass(frozen=True, slots=True)
class Outer:
    count: int
    inners: tuple[Inner, ...]
    named: dict[str, Inner]
    maybe: int | None
    flag: bool = False


@dataclass(frozen=True, slots=True)
class Round:
    radius: float
    kind: Literal["round"] = "round"


@dataclass(frozen=True, slots=True)
class Square:
    side: int
    kind: Literal["square"] = "square"


@dataclass(frozen=True, slots=True)
class Holder:
    shape: Round | Square | None


GOOD: dict[str, Any] = {"count": 2, "inners": [{"kind": "a", "size": 3}], "named": {}, "maybe": None}


def test_a_record_is_read() -> None:
    assert read_record(Outer, GOOD) == Outer(2, (Inner("a", 3.0),), {}, None)
    assert read_record(Outer, {**GOOD, "maybe": 4, "named": {"x": {"kind": "b"}}}).named == {"x": Inner("b")}


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"count": True}, "True where int"),
        ({"count": None}, "None where int"),
        ({"inners": {"kind": "a"}}, "where list"),
        ({"inners": [{"kind": "c"}]}, "'c' where one of a, b"),
        ({"inners": [{"kind": []}]}, "where one of a, b"),
        ({"named": []}, "where dict"),
        ({"maybe": "4"}, "'4' where int"),
        ({"flag": 1}, "1 where bool"),
        ({"inners": ""}, "where list"),
        ({"inners": [{"kind": "a", "size": 10**400}]}, "where a finite number"),
        ({"inners": [{"kind": "a", "size": float("nan")}]}, "where a finite number"),
        ({"other": 1}, "Outer without, or with an unknown, other"),
    ],
)
def test_what_is_wrong_is_named(wrong: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        read_record(Outer, {**GOOD, **wrong})


def test_a_missing_field_is_named() -> None:
    with pytest.raises(ValueError, match="maybe"):
        read_record(Outer, {name: value for name, value in GOOD.items() if name != "maybe"})


def test_a_variant_is_told_by_its_kind() -> None:
    assert read_record(Holder, {"shape": {"side": 2, "kind": "square"}}) == Holder(Square(2))
    assert read_record(Holder, {"shape": None}) == Holder(None)
    for wrong in ({"side": 2}, {"side": 2, "kind": "round"}, {"side": 2, "kind": []}, "square"):
        with pytest.raises(ValueError, match=r"was expected|without"):
            read_record(Holder, {"shape": wrong})
