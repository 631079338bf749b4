"""Chat templates that never end, or make more than memory holds, refuse; others stay as they are."""

from __future__ import annotations

import resource

import pytest

from pipeline.serving.chat import ChatTemplate
from pipeline.serving.template_bounds import LARGEST_SOURCE
from storage.errors import UsageError

SAID = ({"role": "user", "content": "a question"},)
ROOM = 2 << 30  # bytes that the process may take beyond what it has, and does not

HOSTILE = {
    "nested loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "loops over a list": "{% set x = range(9999) | list %}" + "{% for a in x %}" * 4 + "{% endfor %}" * 4,
    "a macro that calls itself twice": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}"
    "{% endmacro %}{{ f(60) }}",
    "a text times a number": "{{ 'a' * 99999999999 }}",
    "a list times a number": "{{ ([1] * 99999999999) | length }}",
    "a power": "{{ 9 ** (9 ** 9) }}",
    "doubling": "{% set n = namespace(x='ab') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}"
    "{% endfor %}",
    "adding": "{% set n = namespace(x='ab') %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}",
    "adding lists": "{% set n = namespace(x=[1]) %}"
    "{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}",
    "a width": "{{ 'a'.ljust(99999999999) }}",
    "a width in a form": "{{ '%99999999999d' % 1 }}",
    "a width beside a form": "{{ '%*d' % (99999999999, 1) }}",
    "a width in another form": "{{ '{:>99999999999}'.format(1) }}",
    "a width within a form": "{{ '{:>{}}'.format(1, 99999999999) }}",
    "a filter's width": "{{ 'a' | center(99999999999) }}",
    "a filter's indent": "{{ 'a' | indent(99999999999, true) }}",
    "an indent of lines": "{{ ('\\n' * 99999) | indent(99999) }}",
    "an indent of JSON": "{{ messages | tojson(indent=99999999999) }}",
    "a batch": "{{ [1] | batch(99999999999, 'x') | list | length }}",
    "replacing": "{{ ('a' * 99999).replace('a', 'b' * 99999) | length }}",
    "joining": "{{ (['a' * 99999] * 99999) | join | length }}",
    "joining by a method": "{{ ''.join(['a' * 99999] * 99999) | length }}",
    "many large texts": "{% for a in range(99999) %}{% set x = 'a' * 4000000 %}{% endfor %}",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_template_takes_bounded_time_and_memory(name: str) -> None:
    template = ChatTemplate(HOSTILE[name], {})
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UsageError, match="the chat template refuses these messages: it "):
        template.render(SAID)
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < ROOM


def test_what_is_spent_is_spent_once() -> None:
    """A template that works hard works as hard the next time."""
    template = ChatTemplate("{% for a in range(90000) %}{% endfor %}{{ messages[0].content }}", {})
    assert [template.render(SAID) for _ in range(12)] == ["a question"] * 12


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("x" * (LARGEST_SOURCE + 1), "characters, which is too many"),
        ("{{ " + "(" * 50_000 + " }}", "does not compile"),
        ("{% for a in messages %}" * 60 + "{% endfor %}" * 60, "does not compile"),
    ],
    ids=["long", "brackets", "loops"],
)
def test_a_source_that_no_compiler_takes(source: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        ChatTemplate(source, {})


def test_ordinary_templates_are_as_they_were() -> None:
    source = (
        "{% for m in messages %}{{ loop.index ~ '. ' ~ m.role | upper }}: "
        "{{ m['content'].replace('a', 'A') + '!' }}{{ '\\n' if not loop.last else '' }}{% endfor %}"
        "{{ '%05.1f' % 2.5 }} {{ [1, 2] | join(', ') }} {{ 3 * 'x' }}"
        " {{ 2 ** 10 }} {{ 'b'.ljust(3) }}| {{ {'k': 1} | tojson(indent=2) }} {{ '{:>4}'.format(7) }}"
    )
    said = ChatTemplate(source, {}).render(SAID)
    assert said == '1. USER: A question!002.5 1, 2 xxx 1024 b  | {\n  "k": 1\n}    7'
