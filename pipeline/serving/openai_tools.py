"""Messages, tools and formats of OpenAI's chat requests, and what they are to the ring."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from pipeline.ring.grammar import Schema
from pipeline.serving.calls import AUTO, REQUIRED, Function, Tools
from pipeline.serving.chat import ChatTemplate
from storage.errors import UsageError

ANY_OBJECT = {"type": "object"}
MAX_TOOLS = 128


class BadRequest(UsageError):
    """A request that is refused; `param` names the field, `code` is OpenAI's where it has one."""

    def __init__(self, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.code = code


class Closed(BaseModel):
    """What is not known here might have changed the answer."""

    model_config = ConfigDict(extra="forbid")


# -- the answer's format --------------------------------------------------------------------------


class NamedSchema(Closed):
    name: str
    description: str | None = None
    # `schema` is a method of pydantic's own.
    given: Annotated[dict[str, Any], Field(alias="schema")]
    strict: bool | None = None  # an answer follows its schema in any case


class ResponseFormat(Closed):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: NamedSchema | None = None

    def schema_of_answer(self) -> dict[str, Any] | None:
        """None: any text will do. Raises BadRequest."""
        if (self.json_schema is None) == (self.type == "json_schema"):
            raise BadRequest(
                "response_format: json_schema is given where the type is json_schema", "response_format"
            )
        if self.json_schema is not None:
            return self.json_schema.given
        return ANY_OBJECT if self.type == "json_object" else None


# -- tools ----------------------------------------------------------------------------------------


class ToolFunction(Closed):
    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None  # None: it takes none
    strict: bool | None = None  # a call follows its schema in any case


class Tool(Closed):
    type: Literal["function"]
    function: ToolFunction

    def shown(self) -> dict[str, Any]:
        """To the chat template, which expects a description and parameters."""
        function = self.function
        parameters = function.parameters or {"type": "object", "properties": {}}
        said = {"description": function.description or "", "parameters": parameters}
        return {"type": "function", "function": {"name": function.name, **said}}

    def callable(self) -> Function:
        """Raises BadRequest for parameters that are no schema of an object."""
        given = self.function.parameters
        name = f"tools: the parameters of {self.function.name}"
        if given is None:
            return Function(
                self.function.name, Schema.of(name, {**ANY_OBJECT, "additionalProperties": False})
            )
        if given.get("type", "object") != "object":
            raise BadRequest(f"{name} must have the type object", "tools")
        try:
            return Function(self.function.name, Schema.of(name, {"type": "object", **given}))
        except UsageError as error:
            raise BadRequest(str(error), "tools") from error


class FunctionName(Closed):
    name: str


class NamedTool(Closed):
    type: Literal["function"]
    function: FunctionName


def tools_of(
    given: Sequence[Tool],
    choice: Literal["none", "auto", "required"] | NamedTool | None,
    parallel: bool | None,
    template: ChatTemplate | None,
) -> Tools | None:
    """What an answer may call; None: nothing, and the model does not hear of tools. Raises BadRequest."""
    if not given and choice not in (None, "none", "auto"):
        raise BadRequest("tool_choice asks for a call, and there are no tools", "tool_choice")
    if not given or choice == "none":
        return None
    if len(given) > MAX_TOOLS:
        raise BadRequest(f"tools: at most {MAX_TOOLS} of them", "tools")
    names = [tool.function.name for tool in given]
    if len({*names}) < len(names):
        raise BadRequest("tools: two functions have one name", "tools")
    wanted = choice.function.name if isinstance(choice, NamedTool) else None
    if wanted is not None and wanted not in names:
        raise BadRequest(
            f"tool_choice names the function {wanted!r}, which is none of the tools", "tool_choice"
        )
    if template is None:
        raise BadRequest("tools are not supported: this model has no chat template", "tools")
    try:
        form = template.call_form
    except UsageError as error:
        raise BadRequest(str(error), "tools") from error
    return Tools(
        shown=tuple(tool.shown() for tool in given),
        functions=tuple(tool.callable() for tool in given if wanted in (None, tool.function.name)),
        choice=AUTO if choice in (None, "auto") else REQUIRED,
        parallel=wanted is None and parallel is not False,
        form=form,
    )


def check_schemas(answer: dict[str, Any] | None, tools: Tools | None) -> None:
    """Whether the schemas of a request can be followed, before it waits for its turn. Raises BadRequest."""
    try:
        if answer is not None:
            Schema.of("response_format: the JSON schema", answer).check()
    except UsageError as error:
        raise BadRequest(str(error), "response_format") from error
    try:
        for function in tools.functions if tools is not None else ():
            function.parameters.check()
    except UsageError as error:
        raise BadRequest(str(error), "tools") from error


# -- messages -------------------------------------------------------------------------------------


class TextPart(BaseModel):
    type: Literal["text"]
    text: str


class RefusalPart(BaseModel):
    """An assistant's, in its own words."""

    type: Literal["refusal"]
    refusal: str

    @property
    def text(self) -> str:
        return self.refusal


class CalledFunction(BaseModel):
    name: str
    arguments: str  # JSON


class ToolCall(BaseModel):
    id: str
    type: Literal["function"] = "function"
    function: CalledFunction

    def plain(self) -> dict[str, Any]:
        """As chat templates know it: the arguments as a map. Raises BadRequest."""
        try:
            arguments = json.loads(self.function.arguments)
        except ValueError:
            arguments = None
        if not isinstance(arguments, dict):
            raise BadRequest(f"the arguments of the call {self.id} are no JSON object", "messages")
        function = {"name": self.function.name, "arguments": arguments}
        return {"id": self.id, "type": "function", "function": function}


class Message(BaseModel):
    """One chat message; a content in parts is joined."""

    role: str
    content: str | list[TextPart | RefusalPart] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None  # of an assistant
    tool_call_id: str | None = None  # of a tool


def plain(messages: Sequence[Message]) -> tuple[dict[str, Any], ...]:
    """As chat templates know them. Raises BadRequest."""
    called: dict[str, str] = {}  # the function's name by the call's id
    found: list[dict[str, Any]] = []
    for index, message in enumerate(messages):
        parts = message.content
        if parts is None and message.role != "assistant":  # which may have said nothing
            raise BadRequest(f"messages.{index}.content is missing", f"messages.{index}.content")
        content = parts if isinstance(parts, str) else "".join(part.text for part in parts or ())
        said: dict[str, Any] = {"role": message.role, "content": content}
        if message.tool_calls:
            said["tool_calls"] = [call.plain() for call in message.tool_calls]
            called |= {call.id: call.function.name for call in message.tool_calls}
        if message.tool_call_id is not None:
            said["tool_call_id"] = message.tool_call_id
            name = message.name or called.get(message.tool_call_id)
            said |= {"name": name} if name else {}
        found.append(said)
    return tuple(found)
