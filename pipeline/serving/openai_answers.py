"""OpenAI's completion answers: whole, or as the parts of a stream."""

from __future__ import annotations

import json
import secrets
import string
import time
from typing import Any

from pipeline.serving.call_reader import Call, CallReader
from pipeline.serving.calls import Tools
from pipeline.serving.client_messages import Done, Token
from pipeline.serving.openai_api import ChatRequest, CompletionRequest

LEAST_LOGPROB = -9999.0  # JSON has no infinity
CALL_ID = 9  # letters and digits: what Mistral's templates ask for


class Answers:
    """Builds the answer objects of one HTTP request."""

    def __init__(
        self, request: CompletionRequest | ChatRequest, model: str, tools: Tools | None = None
    ) -> None:
        """`tools`: those that the answer may call."""
        self._tools = tools
        self._reader = self._new_reader()
        self._calls = 0  # in the stream
        self._chat = isinstance(request, ChatRequest)
        self._logprobs = request.logprobs is not None and request.logprobs is not False
        self._model = model
        self._created = int(time.time())
        prefix, self._object = ("chatcmpl", "chat.completion") if self._chat else ("cmpl", "text_completion")
        self._id = f"{prefix}-{secrets.token_hex(12)}"
        options = request.stream_options
        self._with_usage = options is not None and options.include_usage

    def whole(self, choices: list[tuple[list[Token], Done]]) -> dict[str, Any]:
        """The answer of a request without `stream`."""
        return {
            **self._head(self._object),
            "choices": [self._choice(index, tokens, done) for index, (tokens, done) in enumerate(choices)],
            "usage": _usage([done for _, done in choices]),
        }

    def _new_reader(self) -> CallReader | None:
        return None if self._tools is None else CallReader(self._tools.form)

    def _choice(self, index: int, tokens: list[Token], done: Done) -> dict[str, Any]:
        text = "".join(token.text for token in tokens)
        content: dict[str, Any] = {"text": text}
        calls: list[Call] = []
        if self._chat:
            text, calls = self._read(text)
            message = {"role": "assistant", "content": text or (None if calls else ""), "refusal": None}
            content = {"message": message | ({"tool_calls": [_call(one) for one in calls]} if calls else {})}
        return {
            "index": index,
            **content,
            "logprobs": self._logprobs_of(tokens),
            "finish_reason": _finish_reason(done, called=bool(calls)),
        }

    def _read(self, text: str) -> tuple[str, list[Call]]:
        """A whole answer's text and calls."""
        reader = self._new_reader()
        if reader is None:
            return text, []
        found = [*reader.push(text), reader.finish()]
        calls = [one for one in found if isinstance(one, Call)]
        return "".join(one for one in found if isinstance(one, str)), calls

    def first(self, index: int) -> dict[str, Any] | None:
        """What a stream begins with, for each choice."""
        return self._part(index, {"role": "assistant", "content": ""}, None, None) if self._chat else None

    def pieces(self, index: int, token: Token) -> list[dict[str, Any]]:
        """A stream's parts for a token; one whose text is held back has only its logprob to tell."""
        logprobs = self._logprobs_of([token])
        if self._reader is None:
            found: list[str | Call] = [token.text] if token.text else []
        else:
            found = self._reader.push(token.text)
        if not found and logprobs is not None:
            found = [""]
        parts = []
        for one in found:
            parts.append(self._part(index, self._delta(one), logprobs, None))
            logprobs = None  # told once
        return parts

    def last(self, index: int, done: Done) -> list[dict[str, Any]]:
        rest = "" if self._reader is None else self._reader.finish()
        parts = [self._part(index, {"content": rest}, None, None)] if rest else []
        reason = _finish_reason(done, called=bool(self._calls))
        return [*parts, self._part(index, {} if self._chat else {"content": ""}, None, reason)]

    def _delta(self, one: str | Call) -> dict[str, Any]:
        if isinstance(one, str):
            return {"content": one}
        self._calls += 1
        return {"tool_calls": [{"index": self._calls - 1, **_call(one)}]}

    def usage(self, dones: list[Done]) -> dict[str, Any] | None:
        """The stream's last part, where it was asked for."""
        if not self._with_usage:
            return None
        return {**self._head(self._part_object), "choices": [], "usage": _usage(dones)}

    def _part(
        self, index: int, delta: dict[str, Any], logprobs: Any, finish_reason: str | None
    ) -> dict[str, Any]:
        content: dict[str, Any] = {"delta": delta} if self._chat else {"text": delta["content"]}
        choice = {"index": index, **content, "logprobs": logprobs, "finish_reason": finish_reason}
        return {**self._head(self._part_object), "choices": [choice]}

    @property
    def _part_object(self) -> str:
        return "chat.completion.chunk" if self._chat else self._object

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self._id, "object": kind, "created": self._created, "model": self._model}

    def _logprobs_of(self, tokens: list[Token]) -> dict[str, Any] | None:
        if not self._logprobs:
            return None
        real = [token for token in tokens if token.token is not None]
        if self._chat:
            return {
                "content": [
                    {
                        "token": token.text,
                        "logprob": max(token.logprob, LEAST_LOGPROB),
                        "bytes": list(token.text.encode()),
                        "top_logprobs": [],
                    }
                    for token in real
                ],
                "refusal": None,
            }
        return {
            "tokens": [token.text for token in real],
            "token_logprobs": [max(token.logprob, LEAST_LOGPROB) for token in real],
            "top_logprobs": None,
            "text_offset": [],
        }


def _finish_reason(done: Done, *, called: bool) -> str:
    """Only what ended by itself has one: a cut answer is an error, or a connection that breaks."""
    assert done.reason in {"stop", "length"}, done.reason
    if done.reason == "length":
        return "length"
    return "tool_calls" if called else "stop"


def _call(call: Call) -> dict[str, Any]:
    number = "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(CALL_ID))
    function = {"name": call.name, "arguments": json.dumps(call.arguments, ensure_ascii=False)}
    return {"id": number, "type": "function", "function": function}


def _usage(dones: list[Done]) -> dict[str, Any]:
    prompt = sum(done.prompt_tokens for done in dones)
    generated = sum(done.generated_tokens for done in dones)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": generated,
        "total_tokens": prompt + generated,
        "prompt_tokens_details": {"cached_tokens": sum(done.cached_tokens for done in dones)},
    }
