"""Answers of a given form: schemas and grammars, held against random tokens of every kind of tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from checkpoints import make_tokenizer
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from jsonschema import Draft202012Validator
from test_gguf_tokenizer import bytes_content, of_metadata, pieces_content
from tokenizers import AddedToken, Tokenizer

from pipeline.ring.generation import GenerationParams
from pipeline.ring.grammar import Grammar, Schema, read_schema
from pipeline.ring.sampling import Sampling
from pipeline.ring.text import Detokenizer
from storage.errors import UsageError
from workers.compute.constraint import Constraint, Constraints, Unfollowable
from workers.compute.sampling import choose
from workers.lab.structured.questions import QUESTIONS

BUILTIN = Path(__file__).resolve().parent.parent / "storage" / "builtin" / "tokenizer.json"
FLAT = {"type": "object", "properties": {"a": {"type": "string", "maxLength": 5}}, "required": ["a"]}


# -- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schema", "sentence"),
    [
        ("{", "is not JSON"),
        ("[]", "must be a JSON object"),
        ({"type": "strng"}, "Invalid type: strng"),
        ({"minLength": "x"}, "minLength"),
        ({"not": {"type": "string"}}, 'Unimplemented keys: ["not"]'),
        ({"type": "array", "uniqueItems": True}, 'Unimplemented keys: ["uniqueItems"]'),
        ({"type": "string", "format": "frob"}, "Unknown format: frob"),
        ({"type": "string", "pattern": "("}, "regex parse error"),
        ({"oneOf": [{"type": "number"}, {"type": "integer"}]}, "oneOf constraints are not supported"),
        ({"$ref": "#/$defs/none"}, "'/$defs/none' does not exist"),
        ({"enum": []}, "Unsatisfiable"),
        ({"type": "integer", "minimum": 3, "maximum": 2}, "Unsatisfiable"),
        ({"type": "object", "required": ["a"], "additionalProperties": False}, "Unsatisfiable"),
        ({"anyOf": [{"$ref": f"#/$defs/{one}"} for one in range(501)]}, "more than 500 schemas"),
        ('{"items":' * 900 + "{}" + "}" * 900, "nested too deeply"),
        ({"$ref": "#"}, "without end"),
        ({"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]}, "without end"),
        ({"type": "array", "items": {"$ref": "#"}, "minItems": 1}, "without end"),
        ({"anyOf": [{"$ref": "#"}, {"allOf": [{"$ref": "#"}]}]}, "without end"),
    ],
)
def test_a_schema_that_cannot_be_followed_is_refused_by_name(schema: Any, sentence: str) -> None:
    with pytest.raises(UsageError) as refused:
        Schema.of("the schema", schema).check()
    assert str(refused.value).startswith("the schema")
    assert sentence in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_schema_that_contains_itself_and_can_end_is_followed() -> None:
    node = {"type": "object", "properties": {"next": {"anyOf": [{"$ref": "#"}, {"type": "null"}]}}}
    Schema.of("it", {**node, "required": ["next"]}).check()


def test_references_that_meet_again_and_again_are_followed_once() -> None:
    """2 to the 60th ways lead from the first to the last."""

    def both(name: str) -> dict[str, Any]:
        properties = {key: {"$ref": f"#/$defs/{name}"} for key in "ab"}
        return {"type": "object", "properties": properties, "required": ["a", "b"]}

    shared = {f"d{number}": both(f"d{number + 1}") for number in range(60)}
    last = {"anyOf": [{"$ref": "#"}, {"type": "null"}]}
    Schema.of("it", {**both("d0"), "$defs": {**shared, "d60": last}})
    with pytest.raises(UsageError, match="without end"):
        Schema.of("it", {**both("d0"), "$defs": {**shared, "d60": {"$ref": "#"}}})


@pytest.mark.parametrize("kind", ["date", "date-time"])
def test_days_that_there_were_and_no_others(kind: str, tmp_path: Path) -> None:
    schema = Schema.of("it", {"type": "object", "properties": {"format": {"type": "string", "format": kind}}})
    tokenizer = make_tokenizer()
    made = constraints(tmp_path, tokenizer)
    rest = "T10:00:00Z" if kind == "date-time" else ""
    days = [f"{year}-02-29" for year in (1900, 2000, 2023, 2024, 2100, 2400)]
    days += ["2023-02-28", "2023-02-30", "2023-04-31", "2023-12-31", "2023-13-01"]
    found = []
    for day in days:
        tokens = tokenizer.encode(f'{{"format":"{day}{rest}"}}', add_special_tokens=False).ids
        constraint = made.of(Grammar.of_schema(schema).text, [2])
        if all(token in constraint.allowed() and constraint.take(token) in (True, False) for token in tokens):
            found.append(day)
    assert found == ["2000-02-29", "2024-02-29", "2400-02-29", "2023-02-28", "2023-12-31"]


def test_a_value_that_looks_like_a_schema_is_left_alone() -> None:
    schema = Schema.of("it", {"const": {"format": "date"}})
    assert json.loads(schema.text)["const"] == {"format": "date"}


def test_the_client_does_not_choose_how_strict_the_library_is() -> None:
    lenient = {"type": "string", "not": {}, "x-guidance": {"lenient": True}}
    with pytest.raises(UsageError, match="Unimplemented"):
        Schema.of("it", lenient).check()


def test_a_schema_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "good.json").write_text(json.dumps(FLAT))
    (tmp_path / "bad.json").write_text('{"enum": []}')
    assert json.loads(read_schema(tmp_path / "good.json").text)["required"] == ["a"]
    with pytest.raises(UsageError, match=r"bad\.json cannot be followed"):
        read_schema(tmp_path / "bad.json")
    with pytest.raises(UsageError, match=r"none\.json cannot be read"):
        read_schema(tmp_path / "none.json")


@pytest.mark.parametrize("other", [{"ignore_eos": True}, {"forced": (1,)}])
def test_what_does_not_go_with_a_form_is_refused(other: dict[str, Any]) -> None:
    grammar = Grammar.of_schema(Schema.of("it", FLAT))
    with pytest.raises(UsageError, match="of a given form"):
        GenerationParams(grammar=grammar, **other).check()


# -- tokenizers ---------------------------------------------------------------------------------


def constraints(directory: Path, tokenizer: Tokenizer | str, vocabulary: int | None = None) -> Constraints:
    """For the tokenizer of a store that has nothing else."""
    text = tokenizer if isinstance(tokenizer, str) else tokenizer.to_str()
    (directory / "tokenizer.json").write_text(text, encoding="utf-8")
    count = vocabulary or Tokenizer.from_str(text).get_vocab_size()
    store = SimpleNamespace(path=directory, architecture=SimpleNamespace(vocabulary=count))
    return Constraints(store)  # type: ignore[arg-type]


def tokenizers(directory: Path) -> dict[str, tuple[Tokenizer, int]]:
    """Every kind that stores have, each with its end token."""
    content = bytes_content("gpt-2")
    made = {
        "letters": make_tokenizer(),
        "builtin": Tokenizer.from_file(str(BUILTIN)),
        "byte-level": Tokenizer.from_str(of_metadata(directory / "b.gguf", content, "llama").json()),
        "pieces": Tokenizer.from_str(of_metadata(directory / "p.gguf", pieces_content(), "llama").json()),
        "gemma": Tokenizer.from_str(of_metadata(directory / "g.gguf", pieces_content(), "gemma3").json()),
    }
    ends = {"byte-level": content["tokenizer.ggml.eos_token_id"]}
    return {name: (tokenizer, ends.get(name, 2)) for name, tokenizer in made.items()}


def written(constraint: Constraint, tokenizer: Tokenizer, end: int, seed: int, most: int = 4000) -> str:
    """The text of a model that has random logits, different ones at every token."""
    generator = np.random.default_rng(seed)
    text, answer = Detokenizer(tokenizer), ""
    for index in range(most):
        logits = generator.normal(size=tokenizer.get_vocab_size() + 3).astype(np.float32)
        token = choose(logits, Sampling(1.0, seed=seed), index, constraint.allowed())
        if token == end:
            break
        answer += text.push(token)
        if constraint.take(token):
            break
    else:
        raise AssertionError(f"no end: {answer!r}")
    return answer + text.finish()


@pytest.mark.parametrize("name", ["letters", "builtin", "byte-level", "pieces", "gemma"])
def test_random_tokens_follow_every_schema_in_every_kind_of_tokenizer(name: str, tmp_path: Path) -> None:
    tokenizer, end = tokenizers(tmp_path)[name]
    made = constraints(tmp_path, tokenizer)
    seen = set()
    for seed, question in enumerate(QUESTIONS * 2):
        grammar = Grammar.of_schema(Schema.of(question.name, question.schema))
        grammar.check()
        text = written(made.of(grammar.text, [end]), tokenizer, end, seed)
        seen.add(text)
        checker = Draft202012Validator.FORMAT_CHECKER
        Draft202012Validator(question.schema, format_checker=checker).validate(json.loads(text))
    assert len(seen) > len(QUESTIONS), "the seeds give different answers"


def test_ids_beyond_the_models_logits_are_never_allowed(tmp_path: Path) -> None:
    made = constraints(tmp_path, make_tokenizer(), vocabulary=100)
    constraint = made.of(Grammar.of_schema(Schema.of("it", {"type": "string"})).text, [2])
    constraint.take(int(constraint.allowed()[0]))  # the quotation mark
    assert constraint.allowed().max() < 100


def test_a_form_that_no_token_continues_is_one_sentence(tmp_path: Path) -> None:
    made = constraints(tmp_path, make_tokenizer(), vocabulary=10)
    constraint = made.of(Grammar.of_schema(Schema.of("it", {"type": "boolean"})).text, [2])
    with pytest.raises(Unfollowable, match="no token of the model"):
        constraint.allowed()


def test_another_kind_of_tokenizer_is_refused(tmp_path: Path) -> None:
    data = json.loads(make_tokenizer().to_str())
    data["decoder"] = {"type": "WordPiece", "prefix": "##", "cleanup": True}
    with pytest.raises(Unfollowable, match="this model's tokenizer"):
        constraints(tmp_path, json.dumps(data)).of(Grammar.of_schema(Schema.of("it", FLAT)).text, [2])


def test_an_end_token_is_no_text_whatever_it_is_called(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([AddedToken(text, special=False) for text in ("[MORE]", "[END]")])
    more, end = tokenizer.token_to_id("[MORE]"), tokenizer.token_to_id("[END]")
    constraint = constraints(tmp_path, tokenizer).of('start: "a" /[^a]+/ "a"', [2, end])
    constraint.take(tokenizer.token_to_id("a"))
    assert {more, end, 2} & {*constraint.allowed().tolist()} == {more}


# -- choosing -----------------------------------------------------------------------------------


@hypothesis_settings(deadline=None)
@given(
    logits=hnp.arrays(np.float32, 40, elements=st.floats(-30, 30, width=32)),
    allowed=st.sets(st.integers(0, 39), min_size=1),
    temperature=st.sampled_from([0.0, 0.5, 1.0]),
    top_k=st.integers(0, 50),
    top_p=st.floats(0.1, 1),
    index=st.integers(0, 100),
)
def test_what_is_not_allowed_is_as_if_it_had_no_chance(
    logits: np.ndarray, allowed: set[int], temperature: float, top_k: int, top_p: float, index: int
) -> None:
    sampling = Sampling(temperature, top_k, top_p, seed=3)
    ids = np.array(sorted(allowed))
    masked = np.full_like(logits, -1e9)
    masked[ids] = logits[ids]
    assert choose(logits, sampling, index, ids) == choose(masked, sampling, index)
