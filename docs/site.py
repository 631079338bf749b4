"""Hook of MkDocs: documents that stand beside the code become pages, and links follow them.

On GitHub and in an editor every link leads to the file itself, on the site to its page. A link to what is no
page, such as a Python file, becomes its name.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
PAGES = {  # from a repository's file to a site's page
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "pipeline/PROTOCOL.md": "protocol.md",
    "storage/FORMAT.md": "format.md",
    "storage/builtin/README.md": "builtin.md",
}
PICTURES = ("storage/builtin/activity.png", "storage/builtin/training.png")
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)#:\s]+)(#[^)]*)?\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages and pictures that do not lie in docs/."""
    for source, page in PAGES.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=text))
    for source in PICTURES:
        files.append(File.generated(config, posixpath.basename(source), abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links between files of the repository into links between pages."""
    origin = {there: here for here, there in PAGES.items()}.get(
        page.file.src_uri, f"docs/{page.file.src_uri}"
    )

    def follow(link: re.Match[str]) -> str:
        mark, text, path, anchor = link.groups(default="")
        target = posixpath.normpath(posixpath.join(posixpath.dirname(origin), path))
        if target in PICTURES:
            there = posixpath.basename(target)
        elif target in PAGES or target.startswith("docs/"):
            there = PAGES.get(target, target.removeprefix("docs/"))
        else:
            return text
        here = posixpath.dirname(page.file.src_uri)
        return f"{mark}[{text}]({posixpath.relpath(there, here or '.')}{anchor})"

    return LINK.sub(follow, markdown)
