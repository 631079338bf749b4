"""A chat template's work, bounded: it is a program of somebody else's, and answers wait while it runs.

Jinja's sandbox keeps a template from files and attributes, not from a loop of a billion rounds or a text of a
terabyte. Here every round of a loop, every call and what operators, filters and methods make of texts and
lists costs something, and a template that has spent `BUDGET` is ended. What would be too large by itself is
refused before it is made.
"""

from __future__ import annotations

import functools
import re
import threading
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import jinja2

BUDGET = 1_000_000  # rounds and calls, at most; some seconds
LARGEST_SOURCE = 1 << 20  # characters of a template
LARGEST = 4 << 20  # characters of a text, and elements of a list, that a template may make
LARGEST_NUMBER = 1 << 20  # of a width, a count or an indent
LARGEST_BITS = 4096  # of a whole number
CHARACTERS, ELEMENTS = 4096, 16  # that cost as much as one round


class TooMuch(Exception):
    """What a template would make, or has done, is beyond its bounds."""


class Spending:
    """What a template has spent; every thread renders for itself."""

    def __init__(self) -> None:
        self._here = threading.local()

    def begin(self) -> None:
        self._here.spent = 0.0

    def spend(self, cost: float) -> None:
        """Raises TooMuch where nothing is left."""
        self._here.spent = getattr(self._here, "spent", 0.0) + cost
        if self._here.spent > BUDGET:
            raise TooMuch("it takes too long")

    def made(self, value: Any) -> Any:
        """The value, paid for. Raises TooMuch for one that is too large."""
        size = len(value) if isinstance(value, str | list | tuple | dict) else 0
        check(size)
        self.spend(1 + size / (CHARACTERS if isinstance(value, str) else ELEMENTS))
        return value


def check(size: float) -> None:
    """Raises TooMuch for a text or a list of this size."""
    if size > LARGEST:
        raise TooMuch("it makes a text or a list that is too long")


def check_numbers(values: Iterable[Any]) -> None:
    """Of widths, counts and indents. Raises TooMuch."""
    if any(isinstance(value, int) and abs(value) > LARGEST_NUMBER for value in values):
        raise TooMuch("it asks for a text that is too long")


def check_operation(operator: str, left: Any, right: Any) -> None:
    """Before an operation. Raises TooMuch where its result would be too large."""
    if isinstance(left, int) and isinstance(right, int):
        bits = left.bit_length() * right if operator == "**" else left.bit_length() + right.bit_length()
        if bits > LARGEST_BITS:
            raise TooMuch("it makes a number that is too large")
        return
    sized = (str, list, tuple, bytes)
    if operator == "*":
        for value, count in ((left, right), (right, left)):
            if isinstance(value, sized) and isinstance(count, int):
                check(len(value) * max(0, count))
    elif operator == "+" and isinstance(left, sized) and isinstance(right, sized):
        check(len(left) + len(right))
    elif operator == "%" and isinstance(left, str):
        _check_form(left)


def check_method(name: str, text: str, values: tuple[Any, ...]) -> None:
    """Before a method of a text. Raises TooMuch where its result would be too long."""
    check_numbers(values)
    if name == "replace" and len(values) >= 2 and all(isinstance(one, str) for one in values[:2]):
        check(len(text) + text.count(values[0]) * len(values[1]))
    elif name == "expandtabs" and values and isinstance(values[0], int):
        check(len(text) + text.count("\t") * max(0, values[0]))
    elif name == "join" and values and isinstance(values[0], list | tuple):
        check(sum(len(str(one)) + len(text) for one in values[0]))
    elif name in ("format", "format_map"):
        _check_form(text)


def _check_form(form: str) -> None:
    """Of `'%9d' % …` and `'{:9}'.format(…)`. Raises TooMuch for widths that are long, or not in the text."""
    if re.search(r"\d{6}", form) or "*" in form or re.search(r"\{[^{}]*\{", form):
        raise TooMuch("it asks for a text that is too long")


def _check_filter(name: str, values: tuple[Any, ...]) -> None:
    """Before a filter, of its value and arguments. Raises TooMuch."""
    check_numbers(values[1:])
    if not values:
        return
    value, *rest = values
    if name == "join" and isinstance(value, list | tuple):
        between = len(rest[0]) if rest and isinstance(rest[0], str) else 0
        check(sum(len(str(one)) + between for one in value))
    elif name == "replace" and isinstance(value, str):
        check_method("replace", value, tuple(rest))
    elif name == "indent" and isinstance(value, str):
        width = rest[0] if rest else 4
        each = width if isinstance(width, int) else len(str(width))
        check(len(value) + (value.count("\n") + 1) * each)
    elif name == "format" and isinstance(value, str):
        _check_form(value)


def bounded_filter(name: str, work: Callable[..., Any], spending: Spending) -> Callable[..., Any]:
    """A filter whose result is paid for."""

    @functools.wraps(work)  # also what tells Jinja to pass its context first
    def bounded(*values: Any, **named: Any) -> Any:
        own = values[1:] if hasattr(work, "jinja_pass_arg") else values
        check_numbers(named.values())
        _check_filter(name, own)
        return spending.made(work(*values, **named))

    return bounded


def environment(extensions: list[Any]) -> tuple[jinja2.Environment, Spending]:
    """Jinja's sandbox with bounds, and where they are counted."""
    import jinja2.sandbox
    from jinja2 import nodes

    spending = Spending()

    class Bounded(jinja2.sandbox.ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset({"+", "*", "**", "%"})

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            check_operation(operator, left, right)
            return spending.made(super().call_binop(context, operator, left, right))

        def call(
            __self,  # noqa: N805 - templates name arguments, and may name one self
            __context: Any,
            __obj: Any,
            *args: Any,
            **kwargs: Any,
        ) -> Any:
            method = getattr(__obj, "__wrapped__", __obj)  # the sandbox wraps `format`
            text = getattr(method, "__self__", None)
            if isinstance(text, str):
                check_method(getattr(method, "__name__", ""), text, (*args, *kwargs.values()))
            return spending.made(super().call(__context, __obj, *args, **kwargs))

        def round(self) -> str:
            """Each round of a loop begins with this."""
            spending.spend(1)
            return ""

        def concatenated(self, *values: Any) -> str:
            """What `~` makes."""
            texts = [str(value) for value in values]
            check(sum(map(len, texts)))
            return "".join(texts)

        def _generate(self, source: nodes.Template, *more: Any, **named: Any) -> str:
            _count_rounds(source)
            source.set_environment(self)
            return super()._generate(source, *more, **named)

    made = Bounded(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    for name, work in list(made.filters.items()):
        made.filters[name] = bounded_filter(name, work, spending)
    return made, spending


def _count_rounds(source: Any) -> None:
    """Have each loop count its rounds, and `~` its characters."""
    from jinja2 import nodes

    for loop in list(source.find_all(nodes.For)):
        call = nodes.Call(nodes.EnvironmentAttribute("round"), [], [], None, None)
        loop.body.insert(0, nodes.ExprStmt(call).set_lineno(loop.lineno))
    _replace_concatenations(source)


def _replace_concatenations(node: Any) -> None:
    from jinja2 import nodes

    for field, value in node.iter_fields():
        if isinstance(value, list):
            value[:] = [_without_concatenation(one) for one in value]
        elif isinstance(value, nodes.Node):
            setattr(node, field, _without_concatenation(value))
    for child in node.iter_child_nodes():
        _replace_concatenations(child)


def _without_concatenation(node: Any) -> Any:
    from jinja2 import nodes

    if not isinstance(node, nodes.Concat):
        return node
    call = nodes.Call(nodes.EnvironmentAttribute("concatenated"), node.nodes, [], None, None)
    return call.set_lineno(node.lineno)
