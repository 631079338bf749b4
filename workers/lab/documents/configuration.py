"""The reference of all configuration keys: types from pydantic's schema, meanings from the comments.

The comments of `pipeline/config.py` are the only place where a key's meaning stands: those above a key, and
that at its line's end.
"""

from __future__ import annotations

import ast
import inspect
import io
import json
import tokenize
from typing import Any

from pipeline import config

HEAD = """# Configuration

<!-- Made by `python -m workers.lab.documents` from the schema. -->

Four sources, each over the one before: defaults, the model's file in `configs/`, `--config FILE`, `--set`.
The files are TOML:

```toml
[cache]
share = 0.25
[prefetcher]
queue_depth = 128
```

On a command line the same is `--set cache.share=0.25 --set prefetcher.queue_depth=128`.
An unknown key is an error that names the nearest known one. A default of *left out* means
that flashring decides, as the key's line says.
"""


def page() -> str:
    """The whole page, in Markdown."""
    schema = config.Config.model_json_schema()
    meanings = comments(inspect.getsource(config))
    parts = [HEAD]
    for name in config.Config.model_fields:
        title = schema["properties"][name]["$ref"].rpartition("/")[2]
        section = schema["$defs"][title]
        parts.append(f"## {name}\n\n{section['description'].strip().replace(chr(10), ' ')}\n")
        rows = ["| key | value | default | |", "|---|---|---|---|"]
        for key, field in section["properties"].items():
            meaning = meanings[title, key].replace("|", "\\|")
            rows.append(f"| `{name}.{key}` | {kind(field)} | {default(field)} | {meaning} |")
        parts.append("\n".join(rows) + "\n")
    return "\n".join(parts)


def comments(source: str) -> dict[tuple[str, str], str]:
    """What the comments say of each key of each class: those right above it, then those behind it."""
    alone, beside = _comments(source)
    found = {}
    for section in ast.parse(source).body:
        if not isinstance(section, ast.ClassDef):
            continue
        for node in section.body:
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                said: list[str] = []
                line = node.lineno - 1
                while line in alone:
                    said.insert(0, alone[line])
                    line -= 1
                said += [beside[line] for line in range(node.lineno, _end(node) + 1) if line in beside]
                found[section.name, node.target.id] = " ".join(said)
    return found


def _end(node: ast.AnnAssign) -> int:
    return node.end_lineno or node.lineno


def _comments(source: str) -> tuple[dict[int, str], dict[int, str]]:
    """Comments by line: those that stand alone, and those behind code."""
    alone: dict[int, str] = {}
    beside: dict[int, str] = {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            text = token.string.lstrip("# ")
            (beside if token.line[: token.start[1]].strip() else alone)[token.start[0]] = text
    return alone, beside


def kind(field: dict[str, Any]) -> str:
    """A field's type with its bounds, or its choices."""
    field = next((part for part in field.get("anyOf", ()) if part.get("type") != "null"), field)
    if "enum" in field:
        return ", ".join(f"`{choice}`" for choice in field["enum"])
    if field["type"] == "array":
        return f"list of {kind(field['items'])}"
    names = {"integer": "whole number", "number": "number", "boolean": "`true`, `false`", "string": "text"}
    bounds = {"minimum": "from", "exclusiveMinimum": "above", "maximum": "to", "exclusiveMaximum": "below"}
    told = [f"{word} {field[key]:,}" for key, word in bounds.items() if key in field and field[key] != 2**31]
    return " ".join([names[field["type"]], *told])


def default(field: dict[str, Any]) -> str:
    """A field's default as TOML has it."""
    value = field.get("default")
    return "left out" if value is None else f"`{json.dumps(value)}`"
