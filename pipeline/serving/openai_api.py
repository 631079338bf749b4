"""OpenAI's completion requests, as far as one ring can serve them.

What would change the answer and is not supported is refused by name, never ignored.
"""

from __future__ import annotations

import secrets
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import from_json

from pipeline.serving.answer import RequestOptions, submission
from pipeline.serving.calls import Tools
from pipeline.serving.chat import ChatTemplate
from pipeline.serving.client_messages import Submit
from pipeline.serving.openai_tools import (
    BadRequest,
    Message,
    NamedTool,
    ResponseFormat,
    Tool,
    plain,
    tools_of,
)

CONTINUE_TOKENS = 16  # OpenAI's default of max_tokens for completions
WHOLE_CONTEXT = 1 << 31  # cut to what the context leaves
MAX_PROMPTS = 16  # of one request


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
        "functions": (None, []),
        "function_call": (None, "none", "auto"),
        "reasoning_effort": (None, "none"),
        "verbosity": (None, "medium"),
        "web_search_options": (None,),
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
    response_format: ResponseFormat | None = None
    # Accepted without effect: they do not concern the answer.
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    # This server's own.
    top_k: int | None = None
    ignore_eos: bool = False
    deadline: float = Field(default=0.0, ge=0.0)

    def check(self) -> None:
        """Raises BadRequest for a value that the ring cannot honour."""
        for name, neutral in self.NEUTRAL.items():
            if getattr(self, name, None) not in neutral:
                raise BadRequest(f"{name} is not supported by this server", name, "unsupported_parameter")

    @property
    def schema_of_answer(self) -> dict[str, Any] | None:
        """None: any text will do. Raises BadRequest."""
        return None if self.response_format is None else self.response_format.schema_of_answer()

    def submit(
        self, prompt: str | list[int] | None, messages: tuple[dict[str, Any], ...], limit: int
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
            json_schema=self.schema_of_answer,
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

    def callable_tools(self, template: ChatTemplate | None) -> Tools | None:
        """Those that the answer may call: a continued text calls none."""
        return None

    def submits(self) -> list[Submit]:
        """One request of the ring for every prompt."""
        prompts: list[Any] = [self.prompt] if _is_one_prompt(self.prompt) else list(self.prompt)
        if not 1 <= len(prompts) <= MAX_PROMPTS:
            raise BadRequest(f"a request has 1 to {MAX_PROMPTS} prompts", "prompt")
        limit = self.max_tokens or CONTINUE_TOKENS
        return [self.submit(one, (), limit) for one in prompts]


def _is_one_prompt(prompt: str | list[int] | list[str] | list[list[int]]) -> bool:
    return isinstance(prompt, str) or (bool(prompt) and isinstance(prompt[0], int))


class ChatRequest(Common):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    functions: list[Any] | None = None
    function_call: Any = None
    reasoning_effort: str | None = None
    verbosity: str | None = None
    web_search_options: Any = None
    prediction: Any = None  # what the client expects, which would make an answer come sooner
    modalities: Any = None
    audio: Any = None

    def submits(self) -> list[Submit]:
        limit = self.max_completion_tokens or self.max_tokens or WHOLE_CONTEXT
        return [self.submit(None, plain(self.messages), limit)]

    def callable_tools(self, template: ChatTemplate | None) -> Tools | None:
        return tools_of(self.tools or [], self.tool_choice, self.parallel_tool_calls, template)


def parse(kind: type[CompletionRequest] | type[ChatRequest], body: bytes) -> CompletionRequest | ChatRequest:
    """A field that is null counts as absent. Raises BadRequest naming the first wrong field."""
    try:
        given = from_json(body)
    except ValueError as error:
        raise BadRequest(f"the body is no JSON: {error}") from error
    if isinstance(given, dict):
        given = {name: value for name, value in given.items() if value is not None}
    try:
        return kind.model_validate(given)
    except ValidationError as error:
        problem = error.errors()[0]
        where = _field(given, problem["loc"], missing=problem["type"] == "missing")
        if problem["type"] == "extra_forbidden":
            raise BadRequest(f"unknown parameter {where}", where, "unknown_parameter") from error
        raise BadRequest(f"{where or 'the body'}: {problem['msg']}", where) from error


def _field(given: Any, place: tuple[int | str, ...], *, missing: bool) -> str | None:
    """The field of a request at `place`, where kinds of a value stand between the names of fields.

    A field that is `missing` is the last of `place`, and is named as well.
    """
    found: list[str] = []
    for part in place:
        if isinstance(given, dict):
            if part not in given:
                continue
            given = given[part]
        elif isinstance(given, list) and isinstance(part, int):
            given = given[part]
        else:
            continue
        found.append(str(part))
    if missing:
        found.append(str(place[-1]))
    return ".".join(found) or None
