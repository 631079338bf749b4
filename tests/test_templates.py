"""Chat templates render as transformers renders them; a bad one costs the chat, not the server."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from checkpoints import make_tokenizer

from pipeline.serving import opening
from pipeline.serving.chat import ChatTemplate
from storage.errors import UsageError
from storage.tokenizer import texts

MESSAGES: list[dict[str, Any]] = [
    {"role": "system", "content": 'Be <brief> & "kind".'},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Yo", "reasoning": "greets"},
    {"role": "user", "content": "naïve 龍?"},
]
TOOLS = [{"type": "function", "function": {"name": "f", "description": "ä", "parameters": {"b": 1, "a": []}}}]
EACH = "{% for m in messages %}"
END = "{% endfor %}"
TEMPLATES = {
    "plain": EACH + "<{{ m.role }}>{{ m.content }}\n{% endfor %}<assistant>",
    "training marks": EACH + "{% generation %}{{ m.content }}{% endgeneration %}|{% endfor %}",
    "training marks that cut spaces": EACH
    + "{%- generation -%} {{ m.content }} {%- endgeneration -%}\n{% endfor %}",
    "a name set within marks": "{% set x = 1 %}"
    "{% generation %}{% set x = 2 %}{{ x }}{% endgeneration %}{{ x }}",
    "json": "{{ messages | tojson }}",
    "json, indented": "{{ tools | tojson(indent=4) }}",
    "json, by position": "{{ tools | tojson(true, 2) }}",
    "json, sorted and close": "{{ tools | tojson(sort_keys=true, separators=(',', ':')) }}",
    "json, ascii": "{{ messages | tojson(ensure_ascii=true, indent=none) }}",
    "loop controls": EACH
    + "{% if loop.index == 2 %}{% continue %}{% endif %}{% if loop.last %}{% break %}{% endif %}"
    + "{{ m.content }}"
    + END,
    "a namespace": "{% set ns = namespace(n=0) %}" + EACH + "{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
    "a dict": "{% set d = dict(a=1, b=2) %}{{ d.a + d['b'] }}{{ dict.fromkeys('ab', 3) }}",
    "what dict is": "{{ dict is mapping }}{{ dict.mro is defined }}{{ range(3) | list }}",
    "special tokens": "{{ bos_token }}{{ eos_token }}{{ pad_token }}"
    "{{ image_token }}{{ cls_token is defined }}",
    "reasoning": EACH + "{{ m.reasoning_content }}{{ m.thinking }};{% endfor %}",
    "the prompt's end": "{% if add_generation_prompt %}<assistant>{% endif %}{{ documents is none }}",
    "blocks on lines of their own": "a\n  {% if true %}\n    b\n  {% endif %}\nc\n\n",
    "a macro": "{% macro say(x, y='!') %}{{ x }}{{ y }}{% endmacro %}{{ say('a') }}{{ say('b', y='?') }}",
    "strings": "{{ 'a-b'.split('-')[-1] | upper | trim }}{{ messages[0].content | length }}{{ 'x' ~ 1 }}",
    "filters": "{{ messages | map(attribute='role') | join(',') }}"
    "{{ messages | selectattr('role', 'eq', 'user') | list | length }}",
    "markup is text": "{{ messages[0].content }}{{ messages[0].content | e }}",
}
NAMES = {"bos_token": "<s>", "eos_token": {"content": "</s>", "lstrip": False}, "pad_token": "<pad>"}
SETTINGS = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
SETTINGS |= {"pad_token": "<pad>", "image_token": "<unk>"}


def checkpoint(directory: Path, **settings: Any) -> Path:
    make_tokenizer().save(str(directory / "tokenizer.json"))
    (directory / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (directory / "tokenizer_config.json").write_text(json.dumps({**SETTINGS, **settings}))
    return directory


def stored(directory: Path) -> Path:
    """Those files of a store that are texts."""
    store = directory / "store"
    store.mkdir()
    for name, data in texts(directory).items():
        (store / name).write_bytes(data)
    return store


def assert_as_transformers(directory: Path, tools: list[Any] | None = None) -> str:
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(directory).apply_chat_template(
        MESSAGES, tools=tools, add_generation_prompt=True, tokenize=False
    )
    template = ChatTemplate.of_store(stored(directory))
    assert template is not None
    assert template.render(MESSAGES, tools or ()) == theirs
    return str(theirs)


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_renders_as_transformers_renders_it(name: str, tmp_path: Path) -> None:
    assert_as_transformers(checkpoint(tmp_path, chat_template=TEMPLATES[name]), TOOLS)


NAMED = {"default": "D{{ messages | length }}", "tool_use": "T{{ tools | length }}", "rag": "R"}


@pytest.mark.parametrize("tools", [None, TOOLS])
@pytest.mark.parametrize("where", ["a list", "files", "files beside a list", "one file beside a list"])
def test_named_templates(where: str, tools: list[Any] | None, tmp_path: Path) -> None:
    listed = [{"name": name, "template": template} for name, template in NAMED.items()]
    checkpoint(tmp_path, **({} if where == "files" else {"chat_template": listed}))
    if where != "a list":
        (tmp_path / "chat_template.jinja").write_text("F" + NAMED["default"])
    if where.startswith("files"):
        (tmp_path / "additional_chat_templates").mkdir()
        (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("F" + NAMED["tool_use"])
    found = assert_as_transformers(tmp_path, tools)
    expected = "T1" if tools and where != "one file beside a list" else "D4"
    assert found == ("" if where == "a list" else "F") + expected


def test_special_tokens_that_only_the_older_file_names(tmp_path: Path) -> None:
    checkpoint(tmp_path, chat_template="{{ bos_token }}{{ eos_token }}", bos_token=None)
    (tmp_path / "special_tokens_map.json").write_text(
        json.dumps({"bos_token": "<unk>", "eos_token": "<pad>"})
    )
    assert assert_as_transformers(tmp_path) == "<unk><pad>"


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__ }}",
        "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
        "{{ namespace(_x=1) }}",
        "{{ dict.__call__.__globals__ }}",
        "{{ messages.append(1) }}",
        "{{ raise_exception('roles must take turns') }}",
    ],
)
def test_what_a_template_may_not_do_refuses_the_messages(template: str) -> None:
    with pytest.raises(UsageError):
        ChatTemplate(template, {}).render(MESSAGES)


@pytest.mark.parametrize("template", ["{% for %}", "{{ x | no_such_filter }}", "{% no_such_tag %}", "{{"])
def test_a_bad_template_costs_the_chat_and_not_the_server(
    template: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from types import SimpleNamespace

    checkpoint(tmp_path, chat_template=template)
    store = SimpleNamespace(path=stored(tmp_path), manifest=SimpleNamespace(name="tiny"))
    lines: list[str] = []
    assert opening._template(store, None, lines.append) is None  # type: ignore[arg-type]
    assert len(lines) == 1
    assert "tiny answers no chat messages" in lines[0]
    file = tmp_path / "own.jinja"
    file.write_text(template)
    with pytest.raises(UsageError, match="does not compile"):  # who names a file wants that one
        opening._template(store, file, lines.append)  # type: ignore[arg-type]
