"""Who is let in, before any endpoint."""

from __future__ import annotations

import hmac

from starlette.types import ASGIApp, Receive, Scope, Send

from pipeline.serving.endpoint import is_loopback
from pipeline.serving.http.refusal import Refusal


class Guard:
    """Lets requests in: by Host header on loopback (against DNS rebinding), by key where there is one."""

    OPEN_PATHS = ("/", "/health")

    def __init__(self, app: ASGIApp, *, loopback: bool, api_key: str) -> None:
        self._app = app
        self._loopback = loopback
        self._api_key = api_key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        headers = {name.lower(): value for name, value in scope["headers"]}
        refusal = self._refuse(scope["path"], headers)
        if refusal is None:
            await self._app(scope, receive, send)
        else:
            await refusal.response()(scope, receive, send)

    def _refuse(self, path: str, headers: dict[bytes, bytes]) -> Refusal | None:
        host = headers.get(b"host", b"").decode("latin-1")
        name = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() else host
        if self._loopback and not is_loopback(name):
            return Refusal(403, "this server answers only to names of this machine")
        if self._api_key and path not in self.OPEN_PATHS:
            given = headers.get(b"authorization", b"")
            if not hmac.compare_digest(given, b"Bearer " + self._api_key):
                return Refusal(401, "the API key is missing or wrong", "invalid_api_key")
        return None
