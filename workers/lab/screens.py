"""The pictures of docs/screens: `python -m workers.lab.screens --out docs/screens`.

What a terminal shows is drawn by rich as SVG, from a ring of the built-in model that runs for it; the page
comes from a headless browser, where this machine has Chromium and its driver.
"""

from __future__ import annotations

import io
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import typer
from rich.console import Console, RenderableType
from rich.text import Text

from pipeline import program
from pipeline.console import say
from pipeline.launch import ROOT
from pipeline.models.names import configure
from pipeline.planner.divide import plan
from pipeline.planner.probe import probe_rate
from pipeline.ring.generation import GenerationParams
from pipeline.ring.session import Session
from pipeline.watching.display import rendered
from pipeline.watching.figures import Figures
from pipeline.watching.watch import Watch
from storage.errors import FlashringError
from workers.lab import webdriver

PROMPT = "Once upon a time"
SETTINGS = ("cache.share=0.25",)  # so that there is something to read
COLUMNS = 100
TOKENS = 160
FONT = re.compile(r"@font-face \{.*?\}\s*", re.DOTALL)  # which a reader's browser would fetch from elsewhere
PHONE = {"width": 390, "height": 844, "deviceScaleFactor": 2, "mobile": True}


def draw(file: Path, title: str, *shown: RenderableType) -> None:
    """A terminal window with this in it, as SVG."""
    console = Console(record=True, width=COLUMNS, file=io.StringIO())
    for one in shown:
        console.print(one)
    svg = FONT.sub("", console.export_svg(title=title))
    file.write_text(svg, encoding="utf-8")
    say(f"wrote {file}")


class Frames(Watch):
    """Keeps what --watch would draw."""

    def __init__(self, session: Session, ceiling: float) -> None:
        super().__init__(session, ceiling)
        self._drawn = self._held = True
        self.latest: Figures | None = None
        self.text = ""

    def _draw(self, found: Figures) -> None:
        self.latest, self.text = found, self._text


def watch(file: Path) -> None:
    """The last frame of --watch over a generation."""
    source, config = configure("", None, (*SETTINGS, "compute.audit=4"), {})
    store = source.open_store()
    report = plan(store, config)
    with Session(store, report.config, report.plan, budget=report.budget) as session:
        frames = Frames(session, probe_rate(store))
        session.look = frames
        frames.piece(PROMPT)
        for piece in session.generate(PROMPT, GenerationParams(TOKENS, ignore_eos=True)):
            frames.piece(piece)
    if frames.latest is None:
        raise FlashringError("the generation was over before its first frame")
    title = f'run.py --prompt "{PROMPT}" --watch'
    draw(file, title, rendered(frames.latest, frames.text, COLUMNS))


def timeline(file: Path) -> None:
    """What `run.py timeline` says of a run."""
    with TemporaryDirectory(prefix="flashring-screens-") as directory:
        trace = Path(directory) / "run.json.gz"
        _run(
            "--prompt", PROMPT, "--set", SETTINGS[0], "--max-new-tokens", str(TOKENS), "--ignore-eos",
            "--timeline", str(trace),
        )  # fmt: skip
        said = _run("timeline", str(trace))
    draw(file, "run.py timeline run.json.gz", Text(said.rstrip()))


def _run(*arguments: str) -> str:
    """Standard output of run.py. Raises FlashringError with what it said where it failed."""
    command = [sys.executable, str(ROOT / "run.py"), *arguments]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    if ran.returncode:
        raise FlashringError(f"run.py {arguments[0]} failed: {ran.stderr.strip()}")
    return ran.stdout


@contextmanager
def _serving(directory: Path) -> Iterator[str]:
    """The page's address."""
    command = [sys.executable, str(ROOT / "run.py"), "serve", "--endpoint", f"ipc://{directory / 'socket'}"]
    command += ["--http", "127.0.0.1:0", *(f"--set={one}" for one in SETTINGS)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            for line in process.stderr:
                if "http://" in line:
                    yield line.split()[-1]
                    break
        finally:
            process.send_signal(signal.SIGTERM)
            process.communicate(timeout=30)


def page(wide: Path, phone: Path) -> None:
    """The page in the middle of an answer, on a desk, and on a phone in the dark."""
    with (
        TemporaryDirectory(prefix="flashring-screens-") as directory,
        _serving(Path(directory)) as url,
        webdriver.window(Path(directory) / "profile") as browser,
    ):
        browser.open(url)
        browser.until("return document.getElementById('model').textContent !== ''")
        browser.run(
            "document.getElementById('seed').value = 0; document.getElementById('tokens').value = 500"
        )
        browser.click("#go")
        browser.until("return (document.getElementById('text') || {}).textContent?.length > 300")
        browser.screenshot(wide)
        say(f"wrote {wide}")
        for command, params in (
            ("setDeviceMetricsOverride", PHONE),
            ("setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": "dark"}]}),
        ):
            browser.ask("POST", "/goog/cdp/execute", {"cmd": f"Emulation.{command}", "params": params})
        browser.screenshot(phone)
        say(f"wrote {phone}")


def main(
    out: Annotated[Path, typer.Option(help="The pictures' directory.", metavar="DIR")] = Path("docs/screens"),
) -> None:
    """Make the pictures of docs/screens, from rings that run for them."""
    os.environ.setdefault("TERM", "xterm-256color")
    out.mkdir(parents=True, exist_ok=True)
    watch(out / "watch.svg")
    timeline(out / "timeline.svg")
    if webdriver.browser() is None:
        say("this machine has no Chromium with ChromeDriver: the page's pictures stay as they are")
    else:
        page(out / "page.png", out / "page-phone.png")


def run() -> int:
    """The command line's exit status."""
    return program.single(main)


if __name__ == "__main__":
    sys.exit(run())
