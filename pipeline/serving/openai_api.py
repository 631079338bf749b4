"""OpenAI's completion requests, as far as one ring can serve them.

What would change the answer and is not supported is refused by name, never ignored.
"""

from __future__ import annotations

import secrets
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

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
    # This server's own.
    top_k: int | None = None
    ignore_eos: bool = False
    deadline: float = Field(default=0.0, ge=0.0)

    def check(self) -> None:
        """Raises BadRequest for a value that the ring cannot honour."""
        for name, neutral in self.NEUTRAL.items():
            if getattr(self, name, None) not in neutral:
                raise BadRequest(f"{name} is not supported by this server", name)

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
    modalities: Any = None
    audio: Any = None

    def submits(self) -> list[Submit]:
        limit = self.max_completion_tokens or self.max_tokens or WHOLE_CONTEXT
        return [self.submit(None, plain(self.messages), limit)]

    def callable_tools(self, template: ChatTemplate | None) -> Tools | None:
        return tools_of(self.tools or [], self.tool_choice, self.parallel_tool_calls, template)


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
