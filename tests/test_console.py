"""What goes to the two streams, whatever they can hold."""

from __future__ import annotations

import io
import json
import sys

import pytest

from pipeline.console import write_json

TEXT = 'na\xefve \u9f8d \U0001f409 \x85 "quoted" \\ \udc80 end'


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "koi8-r", "shift_jis", "utf-8", "utf-16"])
def test_json_is_json_in_any_encoding(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    # As `ending.py` opens the streams: what cannot be encoded becomes escapes.
    stream = io.TextIOWrapper(raw, encoding=encoding, errors="backslashreplace")
    monkeypatch.setattr(sys, "stdout", stream)
    write_json({"text": TEXT})
    stream.flush()
    assert json.loads(raw.getvalue().decode(encoding)) == {"text": TEXT}


def test_a_stream_of_no_known_encoding_gets_ascii(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stdout", stream)
    write_json({"text": TEXT})
    assert stream.getvalue().isascii()
    assert json.loads(stream.getvalue()) == {"text": TEXT}
