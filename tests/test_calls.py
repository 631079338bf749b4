"""Calls of tools: which form a template has, the grammar of an answer, and calls read out of its text."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from chat_templates import HERMES, LLAMA, MISTRAL, THINKING, XML
from checkpoints import make_tokenizer
from serving import TEMPLATE
from tokenizers import AddedToken, Tokenizer

from pipeline.ring.grammar import Schema
from pipeline.ring.text import Detokenizer, added_tokens
from pipeline.serving.call_reader import Call, CallReader
from pipeline.serving.calls import AUTO, FORMS, REQUIRED, CallForm, Function, Tools
from pipeline.serving.chat import ChatTemplate
from storage.errors import UsageError
from workers.compute.constraint import Constraints

END, MARK = 2, 260  # tokens: the end of an answer, and Mistral's [TOOL_CALLS]
CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
FUNCTIONS = tuple(
    Function(name, Schema.of(name, {**schema, "additionalProperties": False}))
    for name, schema in (("weather", CITY), ("now", {"type": "object"}))
)
ROME, NOW = Call("weather", {"city": "Rome"}), Call("now", {})
HERMES_FORM, MISTRAL_FORM, TIGHT_FORM, LLAMA_FORM = FORMS


# -- which form ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "form"),
    [
        (HERMES, HERMES_FORM),
        (THINKING, HERMES_FORM),
        (MISTRAL, MISTRAL_FORM),
        (MISTRAL.replace("[TOOL_CALLS] [", "[TOOL_CALLS]["), TIGHT_FORM),
        (LLAMA, LLAMA_FORM),
    ],
)
def test_a_template_shows_its_form(source: str, form: CallForm) -> None:
    assert ChatTemplate(source, {"bos_token": "<s>", "eos_token": "</s>"}).call_form == form


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        (TEMPLATE, "does not show them"),
        ("{% if tools %}{{ raise_exception('no tools') }}{% endif %}" + TEMPLATE, "no tools"),
        (XML, "none of the forms of Hermes, Mistral, Llama 3"),
        ("{{ tools | tojson }}" + TEMPLATE, "none of the forms"),
    ],
)
def test_a_template_without_tools_or_of_another_form_is_refused(source: str, sentence: str) -> None:
    with pytest.raises(UsageError, match="tools are not supported") as refused:
        _ = ChatTemplate(source, {}).call_form
    assert sentence in str(refused.value)


def test_a_template_for_tools_alone_is_used_where_there_are_some(tmp_path: Path) -> None:
    named = [{"name": "default", "template": TEMPLATE}, {"name": "tool_use", "template": HERMES}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    template = ChatTemplate.of_store(tmp_path)
    assert template is not None
    assert template.call_form == HERMES_FORM
    assert template.render([{"role": "user", "content": "x"}]) == "<user>x\n<assistant>"


def test_what_templates_mark_for_training_is_text() -> None:
    marked = "{% generation %}{{ messages[0].content }}{% endgeneration %}!"
    assert ChatTemplate(marked, {}).render([{"role": "user", "content": "x"}]) == "x!"


# -- grammar and reader -------------------------------------------------------------------------


def answers(form: CallForm) -> dict[str, str]:
    """Texts of a form by what they are."""
    rome, now = form.written("weather", '{"city": "Rome"}'), form.written("now", "{}")
    one = form.opening + rome + form.closing
    return {
        "one": one,
        "other": form.opening + now + form.closing,
        "two": form.opening + rome + (form.between or form.closing) + now + form.closing,
        "unknown": form.opening + form.written("frob", "{}") + form.closing,
        "wrong": form.opening + form.written("weather", '{"city": 3}') + form.closing,
        "cut": one[:-9],
        "text": "It is late.",
        "both": f"Well.\n{one}",
        "thought": f"<think>So.\n{one}",
        "json": '{"x": 3}',
        "more": f"{one} more",
    }


TEXTS = {"text", "both", "thought", "json"}  # to which a call may belong
FITS = {
    (REQUIRED, True): {"one", "other", "two"},
    (REQUIRED, False): {"one", "other"},
    (AUTO, True): {"one", "other", "two"} | TEXTS,
}


@pytest.fixture(params=["tokens", "text"])
def tokenizer(request: pytest.FixtureRequest, tmp_path: Path) -> Tokenizer:
    """In which the marks of calls are tokens of their own, or text like any other."""
    made = make_tokenizer()
    if request.param == "tokens":
        made.add_special_tokens([AddedToken("[TOOL_CALLS]", special=True)])
        made.add_tokens(
            [AddedToken(text, special=False) for text in ("<tool_call>", "</tool_call>", "<think>")]
        )
    made.save(str(tmp_path / "tokenizer.json"))
    return made


def tools(form: CallForm, choice: str, parallel: bool) -> Tools:
    return Tools((), FUNCTIONS, choice, parallel, form)


def accepted(grammar: str, tokenizer: Tokenizer, directory: Path, text: str) -> bool:
    """Whether it is a whole answer, token after token."""
    store: Any = SimpleNamespace(
        path=directory, architecture=SimpleNamespace(vocabulary=tokenizer.get_vocab_size())
    )
    constraint = Constraints(store).of(grammar, [END])
    *tokens, last = tokenizer.encode(text, add_special_tokens=False).ids
    for token in tokens:
        if token not in constraint.allowed() or constraint.take(token):
            return False
    return last in constraint.allowed() and (constraint.take(last) or END in constraint.allowed())


@pytest.mark.parametrize("form", FORMS, ids=lambda form: repr(form.opening))
@pytest.mark.parametrize(("choice", "parallel"), FITS)
def test_an_answer_calls_functions_in_the_form_and_no_others(
    form: CallForm, choice: str, parallel: bool, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    grammar = tools(form, choice, parallel).grammar(added_tokens(tokenizer))
    grammar.check()
    fits = {name for name, text in answers(form).items() if accepted(grammar.text, tokenizer, tmp_path, text)}
    expected = FITS[choice, parallel]
    if form is LLAMA_FORM:  # one call is an answer, and what begins like one is one
        expected = expected - {"two", "json"}
    assert fits == expected
    hidden = "TOOL_CALLS" in form.mark and "[TOOL_CALLS]" in tokenizer.get_vocab()
    assert grammar.marks == (("[TOOL_CALLS]",) if hidden else ())


def test_beside_tools_an_answer_may_have_a_schema(tokenizer: Tokenizer, tmp_path: Path) -> None:
    schema = Schema.of("it", {"type": "object", "properties": {"x": {"type": "integer"}}})
    grammar = tools(HERMES_FORM, AUTO, True).grammar(added_tokens(tokenizer), schema)
    grammar.check()
    fits = {
        name
        for name, text in answers(HERMES_FORM).items()
        if accepted(grammar.text, tokenizer, tmp_path, text)
    }
    assert fits == {"one", "other", "two", "json"}
    with pytest.raises(UsageError, match="response_format beside tools"):
        tools(LLAMA_FORM, AUTO, True).grammar(added_tokens(tokenizer), schema)


def read(form: CallForm, text: str, step: int) -> list[str | Call]:
    """What a reader gives, text put together."""
    reader = CallReader(form)
    parts = [part for at in range(0, len(text), step) for part in reader.push(text[at : at + step])]
    joined: list[str | Call] = []
    for part in [*parts, reader.finish()]:
        if part and isinstance(part, str) and joined and isinstance(joined[-1], str):
            joined[-1] += part
        elif part:
            joined.append(part)
    return joined


@pytest.mark.parametrize("form", FORMS, ids=lambda form: repr(form.opening))
@pytest.mark.parametrize("step", [1, 3, 1000])
def test_calls_are_read_however_their_text_comes(form: CallForm, step: int) -> None:
    texts = answers(form)
    assert read(form, texts["one"], step) == [ROME]
    assert read(form, texts["other"], step) == [NOW]
    assert read(form, texts["cut"], step) == (
        [texts["cut"]] if form.closing != HERMES_FORM.closing else [ROME]
    )
    assert read(form, texts["text"], step) == [texts["text"]]
    if form.between:
        assert read(form, texts["two"], step) == [ROME, NOW]
        begun = texts["two"][: texts["two"].index('"now')]
        assert read(form, begun, step) == [ROME, begun[len(texts["one"]) - len(form.closing) :]]
    if form.mark:
        assert read(form, texts["both"], step) == ["Well.\n", ROME]
        assert read(form, form.mark[:-1], step) == [form.mark[:-1]]
        assert read(form, form.mark, step) == [form.mark]


@pytest.mark.parametrize("tokenizer", ["tokens"], indirect=True)
def test_a_special_token_that_begins_calls_is_part_of_their_text(tokenizer: Tokenizer) -> None:
    text = answers(MISTRAL_FORM)["one"]
    tokens = tokenizer.encode(text, add_special_tokens=False).ids
    hidden, shown = Detokenizer(tokenizer), Detokenizer(tokenizer, {MARK: "[TOOL_CALLS]"})
    assert "".join(map(hidden.push, tokens)) + hidden.finish() == text.removeprefix("[TOOL_CALLS]")
    assert "".join(map(shown.push, tokens)) + shown.finish() == text
