"""Chat messages to a prompt, through the checkpoint's own template.

The template is a Jinja program out of the checkpoint (`tokenizer_config.json` or
`chat_template.jinja`), so it is not trusted: it runs in Jinja's sandbox, with the same filters and
functions that Hugging Face's `apply_chat_template` gives it, and its output and its work are bounded
(`template_bounds.py`).
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

from pipeline.launch import SERVE_EXTRA
from pipeline.serving import template_bounds
from pipeline.serving.calls import CallForm, recognised
from storage.errors import CheckpointError, UsageError, reason
from storage.neighbours import Named, content
from storage.store import Store
from storage.tokenizer import template_file

TOKENIZER_CONFIG, TEMPLATE_FILE = "tokenizer_config.json", "chat_template.jinja"
DEFAULT, WITH_TOOLS = "default", "tool_use"  # names of a model's templates
REASONING = ("reasoning_content", "thinking", "reasoning")  # names of what a message's author thought first
LARGEST_PROMPT = 4 << 20  # characters
ROLES = ("system", "user", "assistant", "tool", "developer")


class ChatTemplate:
    """One model's template, compiled."""

    def __init__(self, source: str, special_tokens: Mapping[str, str], with_tools: str = "") -> None:
        """`with_tools`: the template where tools are given; empty: the same.

        Raises UsageError for a template that does not compile, or where Jinja is missing.
        """
        try:
            import jinja2.ext
        except ImportError as error:
            raise UsageError(f"chat needs the package jinja2: {SERVE_EXTRA}") from error
        longest = max(len(source), len(with_tools))
        if longest > template_bounds.LARGEST_SOURCE:
            raise UsageError(f"the model's chat template has {longest:,} characters, which is too many")
        environment, self._spending = template_bounds.environment(
            [jinja2.ext.loopcontrols, _generation_blocks()]
        )
        environment.filters["tojson"] = template_bounds.bounded_filter("tojson", _to_json, self._spending)
        environment.globals["dict"] = _Dict()
        environment.globals["namespace"] = _namespaces()
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = _strftime_now
        self._special_tokens = dict(special_tokens)
        try:
            self._template = environment.from_string(source)
            self._with_tools = environment.from_string(with_tools or source)
        except Exception as error:  # also what Python says of a program that is nested too deeply
            raise UsageError(f"the model's chat template does not compile: {error}") from error

    @classmethod
    def of_store(cls, store: Path, override: Path | None = None) -> ChatTemplate | None:
        """The store's template, or that of the file `override`; None when there is none.

        Raises UsageError for a file that cannot be read or a template that cannot be used.
        """
        templates = {DEFAULT: _read(override)} if override is not None else _templates(store)
        if DEFAULT not in templates:
            return None
        return cls(templates[DEFAULT], _special_tokens(store), templates.get(WITH_TOOLS, ""))

    @cached_property
    def call_form(self) -> CallForm:
        """How the model writes calls of tools. Raises UsageError where it cannot, or in no known form."""
        return recognised(self.render)

    def render(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] = ()) -> str:
        """The prompt, ending where the assistant's answer begins. Raises UsageError."""
        for message in messages:
            if message.get("role") not in ROLES or not isinstance(message.get("content"), str):
                raise UsageError(f"a chat message needs a role ({', '.join(ROLES)}) and a content")
        pieces: list[str] = []
        length = 0
        self._spending.begin()
        try:
            for piece in (self._with_tools if tools else self._template).generate(
                messages=[_with_reasoning(message) for message in messages],
                tools=[dict(tool) for tool in tools] or None,
                documents=None,
                add_generation_prompt=True,
                **self._special_tokens,
            ):
                length += len(piece)
                if length > LARGEST_PROMPT:
                    raise UsageError(f"the chat template's output exceeds {LARGEST_PROMPT:,} characters")
                pieces.append(piece)
        except UsageError:
            raise
        except Exception as error:  # whatever a foreign template does wrong
            raise UsageError(f"the chat template refuses these messages: {error}") from error
        prompt = "".join(pieces)
        if not _is_unicode(prompt):
            raise UsageError("a chat message is not valid UTF-8")
        return prompt


def _generation_blocks() -> type:
    """The tag `generation`, with which templates mark what is trained on: here its content and no more."""
    import jinja2.ext
    from jinja2 import nodes
    from jinja2.parser import Parser

    class Generation(jinja2.ext.Extension):
        def __init__(self, environment: jinja2.Environment) -> None:
            super().__init__(environment)
            self.tags = {"generation"}

        def parse(self, parser: Parser) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            # A block with variables of its own, as in transformers.
            return nodes.CallBlock(self.call_method("shown"), [], [], body).set_lineno(line)

        def shown(self, caller: Callable[[], str]) -> str:
            return caller()

    return Generation


def has_template(store: Store) -> bool:
    """Whether the model is made for conversation; false also where that cannot be read."""
    try:
        return DEFAULT in _templates(store.path)
    except UsageError:
        return False


def require_template(store: Store, override: Path | None = None) -> ChatTemplate:
    """`ChatTemplate.of_store`, which must be there. Raises UsageError."""
    template = ChatTemplate.of_store(store.path, override)
    if template is None:
        raise UsageError(
            f"{store.manifest.name} has no chat template: give it one with --chat-template FILE, "
            "or let it continue a text with --prompt"
        )
    return template


def _is_unicode(text: str) -> bool:
    """Whether there are no lone surrogates, which bytes that were no UTF-8 become."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _read_config(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read: {reason(error)}") from error
    return data if isinstance(data, dict) else {}


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"the chat template {path} cannot be read: {reason(error)}") from error


def _templates(store: Path) -> dict[str, str]:
    """A store's templates by name: those in files of their own, else the configuration's."""
    before, after = template_file("\0").split("\0")
    files = {
        path.name.removeprefix(before).removesuffix(after): path
        for path in sorted(store.glob(template_file("*")))
    }
    if (store / TEMPLATE_FILE).is_file():
        files[DEFAULT] = store / TEMPLATE_FILE
    if files:
        return {name: _read(path) for name, path in files.items()}
    found = _read_config(store / TOKENIZER_CONFIG).get("chat_template")
    if isinstance(found, str):
        return {DEFAULT: found}
    entries = [entry for entry in found if isinstance(entry, dict)] if isinstance(found, list) else []
    return {
        str(entry.get("name")): entry["template"]
        for entry in entries
        if isinstance(entry.get("template"), str)
    }


def _special_tokens(store: Path) -> dict[str, str]:
    """`bos_token` and the like, by the files that say which they are."""
    try:
        values = Named.read(store).values
    except CheckpointError as error:
        raise UsageError(str(error)) from error
    return {
        name: content(value)
        for name, value in values.items()
        if name.endswith("_token") and isinstance(value, str | dict) and content(value)
    }


def _with_reasoning(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message whose reasoning has the names under which templates look for it."""
    found = next((message[name] for name in REASONING if message.get(name) is not None), None)
    if found is None:
        return dict(message)
    return {"thinking": found, **message, "reasoning_content": found}


class _Dict:
    """Python's `dict` for templates, and no more of it."""

    def __call__(self, *values: Any, **named: Any) -> dict[Any, Any]:
        return dict(*values, **named)

    def fromkeys(self, *values: Any) -> dict[Any, Any]:
        return dict.fromkeys(*values)


def _namespaces() -> type:
    """Jinja's namespace without names that begin with `_`, which lead out of the sandbox."""
    from jinja2.exceptions import SecurityError
    from jinja2.utils import Namespace

    def check(name: Any) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise SecurityError(f"a namespace cannot have the attribute {name!r:.40}")

    class Names(Namespace):
        def __init__(*args: Any, **named: Any) -> None:
            for name in dict(*args[1:], **named):
                check(name)
            Namespace.__init__(*args, **named)

        def __setitem__(self, name: str, value: Any) -> None:
            check(name)
            super().__setitem__(name, value)

    return Names


def _raise(message: str) -> NoReturn:
    raise UsageError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON without HTML escapes, unlike Jinja's own filter; the options are transformers', in their order."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _strftime_now(form: str) -> str:
    return datetime.datetime.now().strftime(form)
