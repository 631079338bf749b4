"""The index of docs/results: a line for each report, from its `results.json`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

HEAD = """# Results

<!-- Made by `python -m workers.lab.documents` from the reports in docs/results. -->

Every report has its command, its machine and its conditions at the top. Beside it lies a `results.json` with
all figures. [bench.md](bench.md#results-so-far) and [lowbits.md](lowbits.md) say what they mean. *Quickest*
is the row with the least milliseconds a token (median), *slowest* the one with the most. A mark in
*synthetic* says that no published weights were read, only a model of that shape.

| report | model | synthetic | memory | machine | day | rows | quickest | slowest |
|---|---|---|---|---|---|---|---|---|
"""


def page(folder: Path) -> str:
    """The whole page, in Markdown, of the reports below `folder`."""
    return HEAD + "".join(_line(file) for file in sorted(folder.glob("*/results.json")))


def _line(file: Path) -> str:
    data = json.loads(file.read_text(encoding="utf-8"))
    conditions = data["conditions"]
    rows = [row for row in data["ablation"] if not row.get("error") and not row.get("failed")]
    rows.sort(key=lambda row: row["total_ms"])
    name = file.parent.name
    cells = [
        f"[{name}](results/{name}/results.md)",
        data["model"],
        "✓" if data["synthetic"] else "",
        data["budget"],
        f"{conditions['cpu']}, {conditions['cores']} cores",
        conditions["time"][:10],
        str(len(data["ablation"])),
        _told(rows[0]) if rows else "",
        _told(rows[-1]) if len(rows) > 1 else "",
    ]
    return f"| {' | '.join(cells)} |\n"


def _told(row: dict[str, Any]) -> str:
    return f"{row['total_ms']:,.0f} ms, {row['name']}"
