"""OpenAI's completion requests and answers, as far as one ring can serve them.

What would change the answer and is not supported is refused by name, never ignored.
"""

from __future__ import annotations

import secrets
import time
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pipeline.serving.answer import RequestOptions, submission
from pipeline.serving.client_messages import Done, Submit, Token
from storage.errors import UsageError

CONTINUE_TOKENS = 16  # OpenAI's default of max_tokens for completions
WHOLE_CONTEXT = 1 << 31  # cut to what the context leaves
LEAST_LOGPROB = -9999.0  # JSON has no infinity
MAX_PROMPTS = 16  # of one request


class BadRequest(UsageError):
    """A request that is refused; `param` names the field."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class StreamOptions(BaseModel):
    include_usage: bool = False
    include_obfuscation: bool = False


class Common(BaseModel):
    """Fields of both kinds of completions."""

    model_config = ConfigDict(extra="forbid")
    # Fields that only the neutral value of is accepted, because the ring has nothing like it.
    NEUTRAL: ClassVar[dict[str, tuple[Any, ...]]] = {
        "n": (None, 1),
        "presence_penalty": (None, 0),
        "frequency_penalty": (None, 0),
        "logit_bias": (None, {}),
        "best_of": (None, 1),
        "suffix": (None, ""),
        "echo": (None, False),
        "tools": (None, []),
        "tool_choice": (None, "none", "auto"),
        "functions": (None, []),
        "response_format": (None, {"type": "text"}),
        "modalities": (None, ["text"]),
        "audio": (None,),
        "top_logprobs": (None, 0),
    }

    model: str | None = None
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    # Accepted without effect: they do not concern the answer.
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    # This server's own.
    top_k: int | None = None
    ignore_eos: bool = False
    deadline: float = Field(default=0.0, ge=0.0)

    def check(self) -> None:
        """Raises BadRequest for a value that the ring cannot honour."""
        for name, neutral in self.NEUTRAL.items():
            if getattr(self, name, None) not in neutral:
                raise BadRequest(f"{name} is not supported by this server", name)

    def submit(
        self, prompt: str | list[int] | None, messages: tuple[dict[str, str], ...], limit: int
    ) -> Submit:
        """The message for one answer; where a value was left out, the model's configuration decides."""
        options = RequestOptions(
            max_new_tokens=limit,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            seed=secrets.randbits(31) if self.seed is None else self.seed,
            stop=self.stop or (),
            ignore_eos=self.ignore_eos,
            deadline=self.deadline,
        )
        return submission(0, prompt, messages, options)


class CompletionRequest(Common):
    """POST /v1/completions."""

    prompt: str | list[int] | list[str] | list[list[int]]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: Annotated[int, Field(ge=0, le=1)] | None = None  # the ring tells the chosen token's alone
    echo: bool | None = None
    best_of: int | None = None
    suffix: str | None = None

    def submits(self) -> list[Submit]:
        """One request of the ring for every prompt."""
        prompts: list[Any] = [self.prompt] if _is_one_prompt(self.prompt) else list(self.prompt)
        if not 1 <= len(prompts) <= MAX_PROMPTS:
            raise BadRequest(f"a request has 1 to {MAX_PROMPTS} prompts", "prompt")
        limit = self.max_tokens or CONTINUE_TOKENS
        return [self.submit(one, (), limit) for one in prompts]


def _is_one_prompt(prompt: str | list[int] | list[str] | list[list[int]]) -> bool:
    return isinstance(prompt, str) or (bool(prompt) and isinstance(prompt[0], int))


class TextPart(BaseModel):
    type: Literal["text"]
    text: str


class Message(BaseModel):
    """One chat message; a content in parts is joined."""

    role: str
    content: str | list[TextPart]
    name: str | None = None

    def plain(self) -> dict[str, str]:
        parts = self.content
        content = parts if isinstance(parts, str) else "".join(part.text for part in parts)
        return {"role": self.role, "content": content}


class ChatRequest(Common):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: list[Any] | None = None
    tool_choice: Any = None
    functions: list[Any] | None = None
    response_format: Any = None
    modalities: Any = None
    audio: Any = None

    def submits(self) -> list[Submit]:
        limit = self.max_completion_tokens or self.max_tokens or WHOLE_CONTEXT
        messages = tuple(message.plain() for message in self.messages)
        return [self.submit(None, messages, limit)]


def parse(kind: type[CompletionRequest] | type[ChatRequest], body: bytes) -> CompletionRequest | ChatRequest:
    """Raises BadRequest naming the first wrong field."""
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(str(part) for part in problem["loc"]) or None
        if problem["type"] == "extra_forbidden":
            raise BadRequest(f"unknown parameter {where}", where) from error
        raise BadRequest(f"{where or 'the body'}: {problem['msg']}", where) from error


class Answers:
    """Builds the answer objects of one HTTP request."""

    def __init__(self, request: CompletionRequest | ChatRequest, model: str) -> None:
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

    def _choice(self, index: int, tokens: list[Token], done: Done) -> dict[str, Any]:
        text = "".join(token.text for token in tokens)
        content: dict[str, Any] = {"text": text}
        if self._chat:
            content = {"message": {"role": "assistant", "content": text, "refusal": None}}
        return {
            "index": index,
            **content,
            "logprobs": self._logprobs_of(tokens),
            "finish_reason": _finish_reason(done),
        }

    def first(self, index: int) -> dict[str, Any] | None:
        """What a stream begins with, for each choice."""
        return self._part(index, {"role": "assistant", "content": ""}, None, None) if self._chat else None

    def piece(self, index: int, token: Token) -> dict[str, Any] | None:
        """A stream's part for a token; one whose text is held back has only its logprob to tell."""
        logprobs = self._logprobs_of([token])
        if not token.text and logprobs is None:
            return None
        return self._part(index, {"content": token.text}, logprobs, None)

    def last(self, index: int, done: Done) -> dict[str, Any]:
        return self._part(index, {} if self._chat else {"content": ""}, None, _finish_reason(done))

    def usage(self, dones: list[Done]) -> dict[str, Any] | None:
        """The stream's last part, where it was asked for."""
        if not self._with_usage:
            return None
        return {**self._head(self._part_object), "choices": [], "usage": _usage(dones)}

    def _part(
        self, index: int, delta: dict[str, str], logprobs: Any, finish_reason: str | None
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


def _finish_reason(done: Done) -> str:
    return "length" if done.reason == "length" else "stop"


def _usage(dones: list[Done]) -> dict[str, Any]:
    prompt = sum(done.prompt_tokens for done in dones)
    generated = sum(done.generated_tokens for done in dones)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": generated,
        "total_tokens": prompt + generated,
        "prompt_tokens_details": {"cached_tokens": sum(done.cached_tokens for done in dones)},
    }
