"""An answer other than 200, in OpenAI's form."""

from __future__ import annotations

from typing import Any

from starlette.responses import JSONResponse, Response

from pipeline.errors import CONTEXT, DAMAGED, DEADLINE, FULL, RING, STOPPING, USAGE
from pipeline.serving.client_messages import Submit

STATUS = {USAGE: 400, CONTEXT: 400, FULL: 429, DEADLINE: 504, RING: 503, DAMAGED: 503, STOPPING: 503}
KIND = {429: "rate_limit_error"}  # the others by their hundreds
# Codes on which OpenAI's clients act: they shorten a prompt, or wait.
OPENAI = {CONTEXT: "context_length_exceeded", FULL: "rate_limit_exceeded"}


class Refusal(Exception):
    """An answer other than 200."""

    def __init__(self, status: int, message: str, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.param = param

    @classmethod
    def of(cls, code: str, message: str, submit: Submit | None = None) -> Refusal:
        """For an error by its code in errors.py, of a request where it is about one."""
        asked = None if submit is None else "messages" if submit.messages else "prompt"
        param = asked if code == CONTEXT else None
        return cls(STATUS.get(code, 500), message, OPENAI.get(code, code), param)

    def response(self) -> Response:
        headers = {"Retry-After": "1"} if self.status in (429, 503) else None
        return JSONResponse(self.body(), self.status, headers)

    def body(self) -> dict[str, Any]:
        kind = KIND.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}
