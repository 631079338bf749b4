"""How `--help` reads: `N` for a number, ranges in words, and commands with a whole sentence each."""

from __future__ import annotations

import re
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

NAMES = {"int": "N", "int range": "N", "float": "F", "float range": "F", "path": "PATH"}
WIDE = 10_000  # characters that a command's sentence may have: it is wrapped, and not cut
_TYPE = re.compile(r"<([\w\[\] ]+)>")
_RANGE = re.compile(r"(?:(-?[\d.]+)<=)?x(?:([<>])=(-?[\d.]+))")


def option(names: str, help: str) -> tuple[str, str]:
    """Two columns of an option, as typer made them, for people."""
    names = _TYPE.sub(lambda found: NAMES.get(found[1], "TEXT"), names)
    return names, _RANGE.sub(_words, help).replace("; ]", "]").replace("]  [", "; ").removesuffix("  []")


def argument(name: str, help: str) -> tuple[str, str]:
    """The same of an argument, whose name says what it is."""
    return _TYPE.sub("", name).strip(), help


def _words(found: re.Match[str]) -> str:
    low, sign, bound = found.groups()
    if low is not None:
        return f"{low} to {bound}"
    if sign == "<":
        return f"at most {bound}"
    return "" if float(bound) == 0 else f"at least {bound}"


def _write_options(command: Any, context: Any, formatter: Any) -> None:
    records: dict[str, list[tuple[str, str]]] = {"argument": [], "option": []}
    for parameter in command.get_params(context):
        record = parameter.get_help_record(context)
        if record is not None:
            shape = argument if parameter.param_type_name == "argument" else option
            records[parameter.param_type_name].append(shape(*record))
    for heading, rows in (("Arguments", records["argument"]), ("Options", records["option"])):
        if rows:
            with formatter.section(heading):
                formatter.write_dl(rows)


class Command(TyperCommand):
    """One command."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        _write_options(self, ctx, formatter)


class Group(TyperGroup):
    """Several."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        _write_options(self, ctx, formatter)
        self.format_commands(ctx, formatter)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        shown = [(name, self.get_command(ctx, name)) for name in self.list_commands(ctx)]
        rows = [(name, one.get_short_help_str(WIDE)) for name, one in shown if one is not None]
        with formatter.section("Commands"):
            formatter.write_dl(rows)


class Program(typer.Typer):
    """A typer whose commands are such ones."""

    def command(self, name: str | None = None, **settings: Any) -> Any:
        return super().command(name, **{"cls": Command, **settings})
