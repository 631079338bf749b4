"""Calls of tools out of an answer's text, as it arrives."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from pipeline.serving.calls import CallForm
from pipeline.serving.stopping import StopStrings


@dataclass(frozen=True, slots=True)
class Call:
    """One call that the model wrote."""

    name: str
    arguments: dict[str, Any]


class CallReader:
    """Lets text through up to the first call, and gives each call when it is whole.

    What looks like the beginning of a call is held back. A call that is cut off is text after all: nothing
    that the model wrote is lost. White space around calls does not matter: tokenizers drop some of it.
    """

    def __init__(self, form: CallForm) -> None:
        self._form = form
        self._mark = StopStrings([form.mark] if form.mark else [])
        self._text = True  # no call has begun
        self._begun = False  # something was written
        self._given = False  # a call was whole
        self._held = ""  # since the first call began, without the calls that were given
        self._due = form.opening.removeprefix(form.mark).strip()  # what stands before the next call

    def push(self, text: str) -> list[str | Call]:
        """What is certain now, in its order."""
        found: list[str | Call] = []
        if self._text:
            shown, text = self._before(text)
            found += [shown] if shown else []
        if not self._text:
            self._held += text
            while "}" in text and (call := self._next()):
                found.append(call)
        return found

    def finish(self) -> str:
        """What is still held back, and is no call."""
        if self._text:
            return self._mark.finish()
        if not self._given:
            return self._form.mark + self._held
        rest = self._held.strip()
        connects = any(whole.strip().startswith(rest) for whole in (self._form.closing, self._form.between))
        return "" if connects else self._held

    def _before(self, text: str) -> tuple[str, str]:
        """The text before the first call, and what comes after it if it has begun."""
        if not text:
            return "", ""
        if not self._form.mark:
            self._text = self._begun or not text.startswith("{")
            self._begun = True
            return (text, "") if self._text else ("", text)
        shown = self._mark.push(text)
        if not self._mark.found:
            return shown, ""
        self._text = False
        return shown, self._mark.rest

    def _next(self) -> Call | None:
        """The next call, if it is whole."""
        held = self._held.lstrip()
        if not held.startswith(self._due):
            return None
        body = held[len(self._due) :].lstrip()
        try:
            value, end = json.JSONDecoder().raw_decode(body)
        except ValueError:
            return None
        if not isinstance(value, dict) or not isinstance(value.get(self._form.key), dict):
            return None
        self._given = True
        self._held = body[end:]
        self._due = self._form.between.strip() or "\0"  # which no text has: there is only one call
        return Call(str(value.get("name")), value[self._form.key])
