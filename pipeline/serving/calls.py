"""How models write calls of tools: the forms that are known, and which of them a chat template uses.

A template shows its model's form where it writes a call that was made before, so it is asked to write one.
Nothing is recognised by a model's name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.ring.grammar import Grammar, Schema
from pipeline.ring.text import AddedToken
from storage.errors import UsageError

Render = Callable[[Sequence[Mapping[str, Any]], Sequence[Mapping[str, Any]]], str]  # messages, tools
AUTO, REQUIRED = "auto", "required"


@dataclass(frozen=True, slots=True)
class CallForm:
    """`opening`, then calls with `between` them, then `closing`; a call is `{"name": …, KEY: {…}}`."""

    name: str
    mark: str  # how `opening` begins, which nothing else does; empty: an answer that begins with { is a call
    opening: str
    between: str  # empty: there is only one call
    closing: str
    key: str

    def written(self, name: str, arguments: str) -> str:
        """One call."""
        return f'{{"name": {json.dumps(name)}, "{self.key}": {arguments}}}'


FORMS = (
    CallForm(
        "Hermes",
        mark="<tool_call>",
        opening="<tool_call>\n",
        between="\n</tool_call>\n<tool_call>\n",
        closing="\n</tool_call>",
        key="arguments",
    ),
    *(
        CallForm("Mistral", "[TOOL_CALLS]", f"[TOOL_CALLS]{space}[", ", ", "]", "arguments")
        for space in (" ", "")
    ),
    CallForm("Llama 3", mark="", opening="", between="", closing="", key="parameters"),
)


@dataclass(frozen=True, slots=True)
class Function:
    """One that the model may call."""

    name: str
    parameters: Schema


@dataclass(frozen=True, slots=True)
class Tools:
    """What may be called in one answer, and how."""

    shown: tuple[Mapping[str, Any], ...]  # to the template
    functions: tuple[Function, ...]  # those of them that may be called
    choice: str  # AUTO, or REQUIRED: at least one call
    parallel: bool  # several calls are allowed, where the form has room for them
    form: CallForm

    def grammar(self, added: Mapping[str, AddedToken], answer: Schema | None = None) -> Grammar:
        """Of the answer: calls or, where the choice is `auto`, text, and that of a schema if there is one.

        `added`: the tokenizer's added tokens. Raises UsageError.
        """
        form, words = self.form, _Words(added)
        several = form.between if self.parallel else ""
        schemas = [function.parameters for function in self.functions]
        lines = [
            f"calls: {words.literal(form.opening.removeprefix(form.mark))} call"
            + (f" ({words.literal(several)} call)*" if several else "")
            + f" {words.literal(form.closing)}",
            "call: " + " | ".join(f"call_{index}" for index in range(len(schemas))),
        ]
        for index, (function, schema) in enumerate(zip(self.functions, schemas, strict=True)):
            before, after = form.written(function.name, "\0").split("\0")
            lines += [
                f"call_{index}: {words.literal(before)} arguments_{index} {words.literal(after)}",
                f"arguments_{index}: {schema.rule}",
            ]
        lines += _start(form, self.choice, words, answer)
        parts = (*schemas, answer) if answer is not None else tuple(schemas)
        return Grammar("\n".join(lines), parts, words.hidden(form))


class _Words:
    """What stands in an answer, as grammars have it.

    To the library an added token that is special, or is called like one, is not its text: it stands in a
    grammar by its number.
    """

    def __init__(self, added: Mapping[str, AddedToken]) -> None:
        self._numbered = {
            text: one
            for text, one in added.items()
            if text and (one.hidden or (text.startswith("<") and text.endswith(">")))
        }

    def literal(self, text: str) -> str:
        known = sorted(self._numbered, key=len, reverse=True)
        parts = re.split(f"({'|'.join(map(re.escape, known))})", text) if known else [text]
        return " ".join(self._part(part) for part in parts if part)

    def _part(self, part: str) -> str:
        return f"<[{self._numbered[part].number}]>" if part in self._numbered else json.dumps(part)

    def is_token(self, text: str) -> bool:
        return text in self._numbered

    def visible(self, mark: str) -> str:
        """Those that may stand in a text before calls, such as `<think>`; empty: there are none."""
        shown = [one.number for text, one in self._numbered.items() if text != mark and not one.hidden]
        return f"<[{','.join(map(str, shown))}]>" if shown else ""

    def hidden(self, form: CallForm) -> tuple[str, ...]:
        """The form's tokens that are no part of a text elsewhere."""
        whole = form.opening + form.between + form.closing
        return tuple(text for text, one in self._numbered.items() if one.hidden and text in whole)


def _start(form: CallForm, choice: str, words: _Words, answer: Schema | None) -> list[str]:
    """The rules of a whole answer."""
    mark = words.literal(form.mark)
    if choice == REQUIRED:
        return [f"start: {mark} calls"]
    if answer is not None:
        if not form.mark:
            raise UsageError(
                f"a response_format beside tools is not supported: calls in {form.name}'s form look like JSON"
            )
        return [f"start: {mark} calls | answer", f"answer: {answer.rule}"]
    visible, text = words.visible(form.mark), r"TEXT: /(.|\n)*/"
    if not form.mark:
        more = f" ({visible} TEXT)* | ({visible} TEXT)+" if visible else ""
        return [f"start: calls | FIRST{more}", r"FIRST: /[^{](.|\n)*/", text]
    lead = f"(TEXT {visible})*" if visible else ""
    if words.is_token(form.mark):
        return [f"start: {lead} TEXT {mark} calls | {lead} TEXT", text]
    return [f"start: {lead} marked calls | {lead} TEXT", f"marked[lazy]: TEXT {mark}", text]


# -- which form a template uses -------------------------------------------------------------------

_ARGUMENTS = {"probe_key": "probe value"}
_FUNCTION = {
    "name": "probe_tool",
    "description": "A tool.",
    "parameters": {"type": "object", "properties": {"probe_key": {"type": "string"}}},
}
_TOOL = {"type": "function", "function": _FUNCTION}
_CALL = {
    "id": "probe0001",
    "type": "function",
    "function": {"name": _FUNCTION["name"], "arguments": _ARGUMENTS},
}
_QUESTION = {"role": "user", "content": "A question."}
_ANSWER = {"role": "assistant", "content": "", "tool_calls": [_CALL]}


def recognised(render: Render) -> CallForm:
    """The form of a template. Raises UsageError where it takes no tools, or writes calls in another form."""
    name = str(_FUNCTION["name"])
    try:
        prompt = render([_QUESTION], [_TOOL])
    except UsageError as error:
        raise UsageError(f"tools are not supported: {error}") from error
    if name not in prompt:
        raise UsageError("tools are not supported: this model's chat template does not show them")
    try:
        whole = render([_QUESTION, _ANSWER], [_TOOL])
    except UsageError as error:
        raise UsageError(f"tools are not supported: {error}") from error
    answer = whole.removeprefix(prompt).lstrip() if whole.startswith(prompt) else ""
    for form in FORMS:
        call = form.opening + form.written(name, json.dumps(_ARGUMENTS)).removesuffix("}")
        if (form.mark and call in answer) or answer.startswith(call):
            return form
    known = ", ".join(dict.fromkeys(form.name for form in FORMS))
    raise UsageError(
        f"tools are not supported: this model's chat template writes calls in none of the forms of {known}"
    )
