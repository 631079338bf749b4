"""`python -m workers.lab.documents`: write the pages of docs/ that are made from code and data."""

from __future__ import annotations

import sys
from pathlib import Path

from pipeline import program
from pipeline.console import say
from pipeline.launch import ROOT
from workers.lab.documents import configuration, results

DOCS = ROOT / "docs"


def pages() -> dict[Path, str]:
    """Every page that is made, and what it says."""
    return {
        DOCS / "configuration.md": configuration.page(),
        DOCS / "results.md": results.page(DOCS / "results"),
    }


def main() -> None:
    """Write the pages of docs/ that are made from code and data."""
    for file, text in pages().items():
        file.write_text(text, encoding="utf-8")
        say(f"wrote {file.relative_to(ROOT)}")


if __name__ == "__main__":
    sys.exit(program.single(main))
