"""Ten questions, each with the JSON schema of its answer: together they use what schemas are made of.

Every schema bounds its answer. One that does not, such as a tree of any depth, lets a model write on until
its last token is spent, and what is cut is not valid.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked, and what the answer must be."""

    name: str
    text: str
    schema: dict[str, Any]


def _closed(required: dict[str, Any], **optional: Any) -> dict[str, Any]:
    """An object with these properties and no others."""
    return {
        "type": "object",
        "properties": required | optional,
        "required": list(required),
        "additionalProperties": False,
    }


def _text(longest: int) -> dict[str, Any]:
    return {"type": "string", "maxLength": longest}


def _whole(least: int, most: int) -> dict[str, Any]:
    return {"type": "integer", "minimum": least, "maximum": most}


_ANIMAL = _closed({"name": _text(16), "legs": _whole(0, 8)})

QUESTIONS = (
    Question(
        "person",
        "Describe a person as JSON with name, age and whether they are married.",
        _closed({"name": _text(40), "age": _whole(0, 120), "married": {"type": "boolean"}}),
    ),
    Question(
        "colour", "Answer with one of the colours red, green or blue.", {"enum": ["red", "green", "blue"]}
    ),
    Question(
        "list",
        "List up to five fruits as a JSON array.",
        {"type": "array", "items": _text(20), "minItems": 1, "maxItems": 5},
    ),
    Question(
        "weather",
        "What is the weather in Rome? Answer as JSON with temperature, unit and an optional remark.",
        _closed(
            {"temperature": {"type": "number", "minimum": -40, "maximum": 60}, "unit": {"enum": ["C", "F"]}},
            remark=_text(60),
        ),
    ),
    Question(
        "date",
        "When did people first land on the Moon? Answer as JSON with date and place.",
        _closed({"date": {"type": "string", "format": "date"}, "place": _text(40)}),
    ),
    Question(
        "either",
        "How many moons does Mars have? Answer with a number, or with null if you do not know.",
        {"anyOf": [_whole(0, 200), {"type": "null"}]},
    ),
    Question(
        "nested",
        "Write an order as JSON: the customer with a city, and the items with a count each.",
        _closed(
            {
                "customer": _closed({"name": _text(30), "city": _text(30)}),
                "items": {
                    "type": "array",
                    "minItems": 1,
                    "maxItems": 3,
                    "items": _closed({"what": _text(20), "count": _whole(1, 9)}),
                },
            }
        ),
    ),
    Question(
        "pattern",
        "Invent a product number of three capitals, a dash and four digits.",
        {"type": "string", "pattern": "^[A-Z]{3}-[0-9]{4}$"},
    ),
    Question(
        "shared",
        "Name a predator and its prey as JSON, each with its name and its number of legs.",
        {
            **_closed({"predator": {"$ref": "#/$defs/animal"}, "prey": {"$ref": "#/$defs/animal"}}),
            "$defs": {"animal": _ANIMAL},
        },
    ),
    Question(
        "pair",
        "Give the coordinates of Paris as a JSON array of latitude and longitude.",
        {
            "type": "array",
            "prefixItems": [
                {"type": "number", "minimum": -90, "maximum": 90},
                {"type": "number", "minimum": -180, "maximum": 180},
            ],
            "minItems": 2,
            "items": False,
        },
    ),
)
