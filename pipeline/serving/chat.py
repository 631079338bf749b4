"""Chat messages to a prompt, through the checkpoint's own template.

The template is a Jinja program out of the checkpoint (`tokenizer_config.json` or
`chat_template.jinja`), so it is not trusted: it runs in Jinja's sandbox, with the same filters and
functions that Hugging Face's `apply_chat_template` gives it, and its output is bounded.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

from pipeline.launch import SERVE_EXTRA
from pipeline.serving.calls import CallForm, recognised
from storage.errors import UsageError, reason
from storage.store import Store

TOKENIZER_CONFIG, TEMPLATE_FILE = "tokenizer_config.json", "chat_template.jinja"
LARGEST_PROMPT = 4 << 20  # characters
ROLES = ("system", "user", "assistant", "tool", "developer")


class ChatTemplate:
    """One model's template, compiled."""

    def __init__(self, source: str, special_tokens: Mapping[str, str], with_tools: str = "") -> None:
        """`with_tools`: the template where tools are given; empty: the same.

        Raises UsageError for a template that does not compile, or where Jinja is missing.
        """
        try:
            import jinja2
            import jinja2.ext
            import jinja2.sandbox
        except ImportError as error:
            raise UsageError(f"chat needs the package jinja2: {SERVE_EXTRA}") from error
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols, _generation_blocks()]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = _strftime_now
        self._special_tokens = dict(special_tokens)
        try:
            self._template = environment.from_string(source)
            self._with_tools = environment.from_string(with_tools or source)
        except jinja2.TemplateError as error:
            raise UsageError(f"the model's chat template does not compile: {error}") from error

    @classmethod
    def of_store(cls, store: Path, override: Path | None = None) -> ChatTemplate | None:
        """The store's template, or that of the file `override`; None when there is none.

        Raises UsageError for a file that cannot be read or a template that cannot be used.
        """
        config = _read_config(store / TOKENIZER_CONFIG)
        source = _source(store, config, override)
        if source is None:
            return None
        with_tools = _named(config).get("tool_use", "") if source == _named(config).get("default") else ""
        return cls(source, _special_tokens(config), with_tools)

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
        try:
            for piece in (self._with_tools if tools else self._template).generate(
                messages=[dict(message) for message in messages],
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

        def parse(self, parser: Parser) -> list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    return Generation


def has_template(store: Store) -> bool:
    """Whether the model is made for conversation; false also where that cannot be read."""
    try:
        return _source(store.path, _read_config(store.path / TOKENIZER_CONFIG), None) is not None
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


def _source(store: Path, config: Mapping[str, Any], override: Path | None) -> str | None:
    """The file given, else the store's own file, else the configuration's (default) template."""
    path = override or store / TEMPLATE_FILE
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        if override is not None or not isinstance(error, FileNotFoundError):
            raise UsageError(f"the chat template {path} cannot be read: {reason(error)}") from error
    found = config.get("chat_template")
    return found if isinstance(found, str) else _named(config).get("default")


def _named(config: Mapping[str, Any]) -> dict[str, str]:
    """The configuration's templates where it has several."""
    found = config.get("chat_template")
    entries = [entry for entry in found if isinstance(entry, dict)] if isinstance(found, list) else []
    return {
        str(entry.get("name")): entry["template"]
        for entry in entries
        if isinstance(entry.get("template"), str)
    }


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """`bos_token` and the like, each a string or a map with its `content`."""
    tokens: dict[str, str] = {}
    for name, value in config.items():
        if not name.endswith("_token"):
            continue
        content = value.get("content") if isinstance(value, dict) else value
        if isinstance(content, str):
            tokens[name] = content
    return tokens


def _raise(message: str) -> NoReturn:
    raise UsageError(message)


def _to_json(value: Any, indent: int | None = None, **options: Any) -> str:
    """JSON without HTML escapes, unlike Jinja's own filter."""
    known = {name: options[name] for name in ("separators", "sort_keys") if name in options}
    ascii_only = bool(options.get("ensure_ascii", False))
    return json.dumps(value, ensure_ascii=ascii_only, indent=indent, **known)


def _strftime_now(form: str) -> str:
    return datetime.datetime.now().strftime(form)
