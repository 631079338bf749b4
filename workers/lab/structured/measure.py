"""Answers of one model to the questions, each held against its schema, and the time that masks took."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

from pipeline.ring.generation import GenerationParams
from pipeline.ring.grammar import Grammar, Schema
from pipeline.ring.sampling import Sampling
from pipeline.ring.session import Session
from pipeline.serving.chat import ChatTemplate
from storage.errors import UsageError
from workers.lab.structured.questions import QUESTIONS, Question


def measure(
    session: Session,
    *,
    answers: int,
    temperature: float,
    max_new_tokens: int,
    seed: int,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """`answers` of them, the questions in turns, each with a seed of its own. Raises UsageError."""
    validate = _validator()
    template = ChatTemplate.of_store(session.store.path)
    results = []
    for number in range(answers):
        question = QUESTIONS[number % len(QUESTIONS)]
        params = GenerationParams(
            max_new_tokens,
            Sampling(temperature, seed=seed + number),
            grammar=Grammar.of_schema(Schema.of(question.name, question.schema)),
        )
        text = "".join(session.generate(_prompt(session, template, question), params))
        results.append(_result(session, question, text, validate))
        if not results[-1]["valid"]:
            say(f"{question.name}, seed {seed + number}: {results[-1]['reason']}, {text!r}")
    return _summary(results)


def _prompt(session: Session, template: ChatTemplate | None, question: Question) -> str | list[int]:
    if template is None:
        return f"{question.text}\n"
    asked = template.render([{"role": "user", "content": question.text}])
    return session.encode(asked, special=False)


def _validator() -> Callable[[Any, dict[str, Any]], bool]:
    try:
        from jsonschema import Draft202012Validator
    except ImportError as error:
        raise UsageError(
            "this command needs the package jsonschema: pip install -c constraints.txt -e '.[dev]'"
        ) from error

    def valid(value: Any, schema: dict[str, Any]) -> bool:
        checker = Draft202012Validator.FORMAT_CHECKER
        return bool(Draft202012Validator(schema, format_checker=checker).is_valid(value))

    return valid


def _result(
    session: Session, question: Question, text: str, valid: Callable[[Any, dict[str, Any]], bool]
) -> dict[str, Any]:
    last = session.last
    assert last is not None
    assert last.finished is not None
    try:
        follows = valid(json.loads(text), question.schema)
    except ValueError:
        follows = False
    return {
        "question": question.name,
        "valid": follows,
        "reason": last.finished.reason,
        "tokens": len(last.tokens),
        "masks": last.delta("compute", "masks"),
        "mask_seconds": last.delta("compute", "mask_seconds"),
        "grammar_seconds": last.delta("compute", "grammar_seconds"),
        "decode_seconds": last.finished.decode_seconds,
    }


def _summary(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """`mask_us`: a token; `grammar_ms`: an answer, the first apart, for which the tokenizer is read."""
    masks = sum(one["masks"] for one in results)
    mask_seconds = sum(one["mask_seconds"] for one in results)
    later = [one["grammar_seconds"] for one in results[1:]]
    by_question = {
        question.name: [one for one in results if one["question"] == question.name] for question in QUESTIONS
    }
    return {
        "answers": len(results),
        "valid": sum(one["valid"] for one in results),
        "cut": sum(one["reason"] == "length" for one in results),
        "tokens": sum(one["tokens"] for one in results),
        "mask_us": round(mask_seconds / max(1, masks) * 1e6, 1),
        "mask_share_of_decode": round(
            mask_seconds / max(1e-9, sum(one["decode_seconds"] for one in results)), 4
        ),
        "first_grammar_ms": round(results[0]["grammar_seconds"] * 1e3, 1),
        "grammar_ms": round(sum(later) / max(1, len(later)) * 1e3, 2),
        "questions": {
            name: {
                "answers": len(found),
                "valid": sum(one["valid"] for one in found),
                "tokens": round(sum(one["tokens"] for one in found) / len(found), 1),
                "mask_us": round(
                    sum(one["mask_seconds"] for one in found)
                    / max(1, sum(one["masks"] for one in found))
                    * 1e6,
                    1,
                ),
            }
            for name, found in by_question.items()
            if found
        },
    }
