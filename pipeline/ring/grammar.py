"""What an answer must be: a JSON schema, and the grammar that keeps a model to it.

A grammar is a text that the library `llguidance` reads, as `workers/compute/constraint.py` does to say which
tokens may come next. Here it is only written, and checked without a model. The library is imported where a
grammar is checked: who asks for none does not pay for it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from storage.errors import UsageError, reason

LARGEST_SCHEMA, MOST_REFERENCES = 1 << 20, 500  # characters; what a schema may refer to
# How JSON is written: with a space or a new line where the model wants one, but not without end. What the
# library does not know of JSON Schema is an error, never ignored.
JSON_STYLE = {
    "whitespace_flexible": True,
    "whitespace_pattern": r"(\n[ ]{0,16}|[ ])",
    "coerce_one_of": False,
    "lenient": False,
}
# The library's dates have a 29 February in every year. Beside its own pattern they get this one.
_LEAP = r"[0-9]{2}(0[48]|[2468][048]|[13579][26])|([02468][048]|[13579][26])00"
_DAY = {"pattern": rf"^([0-9]{{4}}-(0[13-9]|1[0-2]|02-[01]|02-2[0-8])|({_LEAP})-02-29)"}
_DATED = ("date", "date-time")
_VALUES = ("const", "enum", "default", "examples")  # whose contents are no schemas


@dataclass(frozen=True, slots=True)
class Schema:
    """One JSON schema."""

    name: str  # what sentences call it
    text: str  # JSON, with the library's options in it

    @classmethod
    def of(cls, name: str, given: str | Mapping[str, Any]) -> Schema:
        """From JSON or what it stands for. Raises UsageError for what is no schema, or has no end."""
        schema = _parsed(name, given) if isinstance(given, str) else given
        if not isinstance(schema, Mapping):
            raise UsageError(f"{name} must be a JSON object")
        try:
            if len(_references(schema)) > MOST_REFERENCES:
                raise UsageError(f"{name} refers to more than {MOST_REFERENCES} schemas")
            if _endless(schema):
                raise UsageError(f"{name} cannot be satisfied: it asks for itself without end")
            text = json.dumps({**_with_calendar(schema), "x-guidance": JSON_STYLE})
        except RecursionError:
            raise UsageError(f"{name} is nested too deeply") from None
        if len(text) > LARGEST_SCHEMA:
            raise UsageError(f"{name} has more than {LARGEST_SCHEMA:,} characters")
        return cls(name, text)

    @property
    def rule(self) -> str:
        """As a part of a grammar."""
        return f"%json {self.text}"

    def check(self) -> None:
        """Raises UsageError for one that nothing satisfies, or that the library cannot follow."""
        from llguidance import LLMatcher

        problem = _problem(LLMatcher.grammar_from_json_schema(self.text))
        if problem:
            raise UsageError(f"{self.name} cannot be followed: {problem}")


@dataclass(frozen=True, slots=True)
class Grammar:
    """What a whole answer must be."""

    text: str
    schemas: tuple[Schema, ...]  # the parts of it that somebody wrote
    marks: tuple[str, ...] = ()  # special tokens that are part of the answer's text

    @classmethod
    def of_schema(cls, schema: Schema) -> Grammar:
        return cls(f"start: {schema.rule}", (schema,))

    def check(self) -> None:
        """Raises UsageError that names the schema which cannot be followed."""
        for schema in self.schemas:
            schema.check()
        problem = _problem(self.text)
        if problem:
            raise UsageError(f"such an answer cannot be followed: {problem}")


def read_schema(file: Path) -> Schema:
    """Of a file. Raises UsageError."""
    name = f"the JSON schema {file}"
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{name} cannot be read: {reason(error)}") from error
    schema = Schema.of(name, text)
    schema.check()
    return schema


def first_sentence(error: str) -> str:
    """What the library says, without its options and its state."""
    line = " ".join(error.partition("<state>")[0].split())
    return line.partition(". Enable ")[0].rstrip(".")[:300]


def _parsed(name: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{name} is not JSON: {error}") from error


def _problem(grammar: str) -> str:
    """Why the library does not take a grammar; empty: it does."""
    from llguidance import LLMatcher

    failed, messages = LLMatcher.validate_grammar_with_warnings(grammar)
    return first_sentence(messages[0]) if failed else ""


def _with_calendar(part: Any) -> Any:
    """A schema, or what is in one, in which dates are days that there were."""
    if isinstance(part, list):
        return [_with_calendar(one) for one in part]
    if not isinstance(part, Mapping):
        return part
    found = {key: one if key in _VALUES else _with_calendar(one) for key, one in part.items()}
    if part.get("format") in _DATED and isinstance(found.get("allOf", []), list):
        found["allOf"] = [*found.get("allOf", []), _DAY]
    return found


def _endless(root: Mapping[str, Any]) -> bool:
    """Whether what must be there contains itself.

    The library only notices that no value satisfies a schema where it meets the contradiction at once.
    """
    waiting, finite = _references(root), set[str]()
    before = -1
    while len(finite) > before:  # a reference ends if what it leads to does, by those that are known to end
        before = len(finite)
        for target in waiting:
            if _ends(_referred(target, root), finite):
                finite.add(target)
        waiting = [target for target in reversed(waiting) if target not in finite]
    return not _ends(root, finite)


def _references(root: Any) -> list[str]:
    """All that a schema refers to."""
    found: dict[str, None] = {}
    parts = [root]
    while parts:
        part = parts.pop()
        if isinstance(part, Mapping):
            parts += part.values()
            if isinstance(part.get("$ref"), str):
                found[part["$ref"]] = None
        elif isinstance(part, list):
            parts += part
    return list(found)


def _ends(schema: Any, finite: Set[str]) -> bool:
    """Whether a value can be whole, where references end that are `finite`."""
    if not isinstance(schema, Mapping):
        return True
    target = schema.get("$ref")
    if isinstance(target, str) and target not in finite:
        return False
    choices = [schema[key] for key in ("anyOf", "oneOf") if isinstance(schema.get(key), list) and schema[key]]
    return all(_ends(part, finite) for part in _needed(schema)) and all(
        any(_ends(choice, finite) for choice in group) for group in choices
    )


def _needed(schema: Mapping[str, Any]) -> list[Any]:
    """The schemas of what must be in a value."""
    needed = [*schema["allOf"]] if isinstance(schema.get("allOf"), list) else []
    properties, required = schema.get("properties"), schema.get("required")
    if isinstance(properties, Mapping) and isinstance(required, list) and _may_only_be(schema, "object"):
        needed += [properties.get(name) for name in required if isinstance(name, str)]
    least = schema.get("minItems")
    if isinstance(least, int) and _may_only_be(schema, "array"):
        first = schema.get("prefixItems")
        needed += first[:least] if isinstance(first, list) else []
        if least > len(needed):
            needed.append(schema.get("items"))
    return needed


def _may_only_be(schema: Mapping[str, Any], kind: str) -> bool:
    return schema.get("type") in (kind, [kind])


def _referred(target: str, root: Mapping[str, Any]) -> Any:
    """What a reference within the schema leads to; None where it leads elsewhere."""
    found: Any = root
    path = target.removeprefix("#")
    for part in path.split("/")[1:]:
        key = part.replace("~1", "/").replace("~0", "~")
        found = found.get(key) if isinstance(found, Mapping) else None
    return found if target.startswith("#") else None
