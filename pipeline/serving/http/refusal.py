"""An answer other than 200, in OpenAI's form."""

from __future__ import annotations

from typing import Any

from starlette.responses import JSONResponse, Response

from pipeline.errors import DEADLINE, FULL, RING, STOPPING, USAGE

STATUS = {USAGE: 400, FULL: 429, DEADLINE: 504, RING: 503, STOPPING: 503}
KIND = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    429: "rate_limit_error",
}


class Refusal(Exception):
    """An answer other than 200."""

    def __init__(self, status: int, message: str, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.param = param

    @classmethod
    def of(cls, code: str, message: str) -> Refusal:
        """For an error by its code in errors.py."""
        return cls(STATUS.get(code, 500), message, code)

    def response(self) -> Response:
        headers = {"Retry-After": "1"} if self.status in (429, 503) else None
        return JSONResponse(self.body(), self.status, headers)

    def body(self) -> dict[str, Any]:
        kind = KIND.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}
