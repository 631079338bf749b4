"""`serve` and `Pipeline` with a real ring: four worker processes under a small random model."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import trace_format
from checkpoints import write_checkpoint
from ring import config, plan_for

from pipeline import Client, Pipeline
from pipeline.ring.generation import GenerationParams
from pipeline.ring.sampling import Sampling
from pipeline.ring.session import Session
from pipeline.tracing import bound, reading, trace
from storage.convert import convert
from storage.errors import FlashringError, RingError
from storage.store import Store
from workers.lab import webdriver

ROOT = Path(__file__).resolve().parent.parent
TEMPLATE = "{% for m in messages %}[{{ m.role }}] {{ m.content }} {% endfor %}"
SETTINGS = ["predictor.kind=oracle", "compute.threads=1", "prefetcher.readers=1", "cache.share=0.25"]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    base = tmp_path_factory.mktemp("serve")
    return convert(write_checkpoint(base / "checkpoint", "opt", "float16"), base / "store", name="small")


class Serving:
    """A `run.py serve` process."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        assert process.stderr is not None
        self.lines: list[str] = []
        self.endpoint = self._address()
        self.url = self._address()

    def _address(self) -> str:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line)
            if "serving small at " in line:
                return line.split("serving small at ")[1].strip()
        raise AssertionError("".join(self.lines))

    def worker(self, name: str) -> psutil.Process:
        for child in psutil.Process(self.process.pid).children():
            if f"workers.{name}" in child.cmdline():
                return child
        raise AssertionError(f"no {name} worker")

    def wait(self) -> tuple[int, str]:
        """Exit status and what it wrote last."""
        _, rest = self.process.communicate(timeout=60)
        return self.process.returncode, rest


@contextmanager
def serving(store: Store, base: Path, *arguments: str) -> Iterator[Serving]:
    template = base / "template.jinja"
    template.write_text(TEMPLATE)
    command = [sys.executable, str(ROOT / "run.py"), "serve", "--model", str(store.path)]
    command += ["--endpoint", f"ipc://{base / 'serve.sock'}", "--http", "127.0.0.1:0", *arguments]
    command += ["--chat-template", str(template), *[f"--set={setting}" for setting in SETTINGS]]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield Serving(process)
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
                process.communicate(timeout=30)


PROMPTS, SEEDS = [f"client {number}" for number in range(8)], range(4)


@pytest.fixture(scope="module")
def alone(store: Store) -> list[list[str]]:
    """The texts that the session itself gives, for every prompt and seed."""
    chosen = config()
    with Session(store, chosen, plan_for(store, chosen)) as session:
        return [
            [
                "".join(session.generate(prompt, GenerationParams(4, Sampling(1.0, 50, 0.95, seed), True)))
                for seed in SEEDS
            ]
            for prompt in PROMPTS
        ]


@pytest.mark.ring
def test_concurrent_clients_get_what_a_lone_run_gives(store, alone, tmp_path):
    def talk(prompt: str) -> list[str]:
        with Client(server.endpoint) as client:
            return [
                client.generate(
                    prompt,
                    max_new_tokens=4,
                    temperature=1.0,
                    top_k=50,
                    top_p=0.95,
                    seed=seed,
                    ignore_eos=True,
                ).read()
                for seed in SEEDS
            ]

    with serving(store, tmp_path) as server, ThreadPoolExecutor(8) as pool:
        texts = list(pool.map(talk, PROMPTS))
        server.process.send_signal(signal.SIGTERM)
        status, _ = server.wait()
    assert texts == alone
    assert status == 0
    assert not (tmp_path / "serve.sock").exists()


@pytest.mark.ring
def test_a_served_ring_writes_its_timeline_at_the_end(store, tmp_path):
    file = tmp_path / "t.json"
    with serving(store, tmp_path, "--timeline", str(file)) as server:
        with Client(server.endpoint) as client:
            for prompt in PROMPTS[:2]:
                client.generate(prompt, max_new_tokens=8, ignore_eos=True).read()
        server.process.send_signal(signal.SIGTERM)
        assert server.wait()[0] == 0
    found = trace.load(file)
    assert trace_format.problems(found) == []
    both = reading.read(found)
    assert both.prompt is not None
    assert both.token is not None
    assert (both.prompt.count, both.token.count) == (2, 14)
    assert both.token.sum_ms == pytest.approx(both.token.ms, rel=0.02)
    assert "a token" in bound.describe(both)[0]


@pytest.mark.ring
def test_a_worker_killed_under_load(store, tmp_path):
    with serving(store, tmp_path) as server, Client(server.endpoint, timeout=60) as client:
        wanted = client.generate("a", max_new_tokens=8, ignore_eos=True).read()
        for death, worker in enumerate(("cache", "prefetcher", "compute"), 1):
            open_answers = [
                client.generate("a", max_new_tokens=tokens, ignore_eos=True) for tokens in (100, 3, 3)
            ]
            next(open_answers[0])
            victim = server.worker(worker)
            victim.kill()
            with pytest.raises(RingError, match=r"worker .*SIGKILL|died 3 times"):
                open_answers[0].read()
            if death < 3:
                for answer in open_answers[1:]:
                    answer.read()  # they waited, and are answered by the new ring
                assert client.generate("a", max_new_tokens=8, ignore_eos=True).read() == wanted
        status, last = server.wait()
        for answer in open_answers[1:]:
            with pytest.raises(FlashringError):
                answer.read()
    assert status == 1
    deaths = [line for line in last.splitlines() if line.startswith("the ring died: ")]
    for number, (line, name) in enumerate(zip(deaths, ("cache", "prefetcher", "compute"), strict=True), 1):
        assert re.fullmatch(
            rf"the ring died: the {name} worker \(pid \d+\) was killed by SIGKILL; "
            rf"death {number} within 60 s, {'it stays down' if number == 3 else 'it is started again'}",
            line,
        )
    assert len(re.findall(r"^the ring runs again, \d+\.\d s after it went down$", last, re.MULTILINE)) == 2
    assert last.splitlines()[-1].startswith("flashring: the ring died 3 times within 60 s")
    assert "Traceback" not in last


@pytest.mark.ring
def test_in_process_equals_served(store, alone):
    with Pipeline.open(str(store.path), settings=SETTINGS) as pipeline:
        texts = [
            [
                pipeline.generate(
                    prompt,
                    max_new_tokens=4,
                    temperature=1.0,
                    top_k=50,
                    top_p=0.95,
                    seed=seed,
                    ignore_eos=True,
                ).read()
                for seed in SEEDS
            ]
            for prompt in PROMPTS[:2]
        ]
        with pipeline.generate("left open", max_new_tokens=100, ignore_eos=True) as unfinished:
            next(unfinished)
        whole = pipeline.generate("one", max_new_tokens=5, ignore_eos=True)
        whole.read()
        assert whole.done is not None
        assert whole.done.generated_tokens == len(whole.tokens) == 5
        assert pipeline.stats()["cache.decode_hits"] > 0
        worker = psutil.Process().children()[0]
        worker.kill()
        worker.wait(20)
        with pytest.raises(RingError):
            pipeline.generate("one", max_new_tokens=5).read()
        again = pipeline.generate("one", max_new_tokens=5, ignore_eos=True)
        again.read()
        assert (again.tokens, again.logprobs) == (whole.tokens, whole.logprobs)
    assert texts == alone[:2]


EMBEDDER = """
import sys
from pipeline import Pipeline
pipeline = Pipeline.open(sys.argv[1], settings=sys.argv[2:])
answer = pipeline.generate("Once", max_new_tokens=100, ignore_eos=True)
next(answer)
import psutil
print(*[child.pid for child in psutil.Process().children()], flush=True)
for piece in answer:
    sys.stdin.read(1)
"""


@pytest.mark.ring
def test_a_killed_embedder_leaves_nothing_behind(store):
    command = [sys.executable, "-c", EMBEDDER, str(store.path), *SETTINGS]
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    ) as embedder:
        assert embedder.stdout is not None
        workers = [psutil.Process(int(pid)) for pid in embedder.stdout.readline().split()]
        assert len(workers) == 4
        embedder.kill()
    _, alive = psutil.wait_procs(workers, timeout=20)
    assert alive == []


def test_serve_refuses_what_cannot_work(store, tmp_path):
    def refusal(*arguments: str) -> str:
        command = [sys.executable, str(ROOT / "run.py"), "serve", *arguments]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert ended.returncode == 2
        assert len(ended.stderr.strip().splitlines()) == 1
        return ended.stderr

    assert "--curve-keys" in refusal("--endpoint", "tcp://0.0.0.0:5555")
    assert "--api-key-file" in refusal("--http", "0.0.0.0:8080")
    (tmp_path / "file").write_text("not a socket")
    assert "is not a socket" in refusal("--endpoint", f"ipc://{tmp_path / 'file'}")


ROWS = (
    "return [...document.querySelectorAll('#layers tr')].map(row => [...row.cells].map(c => c.textContent))"
)
SAID = (
    "return [...document.querySelectorAll('.message')].map("
    "box => [box.classList[1], box.querySelector('.content').textContent])"
)
NOTED = (
    "return !document.getElementById('go').disabled"
    " && document.getElementById('note').textContent.includes('tokens in')"
)
in_browser = pytest.mark.skipif(
    webdriver.browser() is None, reason="no Chromium with ChromeDriver on this machine"
)


def severe(page: webdriver.Browser) -> list[str]:
    """What the browser's console holds against the page."""
    problems = page.ask("POST", "/se/log", {"type": "browser"})
    return [problem["message"] for problem in problems if problem["level"] == "SEVERE"]


def opened(page: webdriver.Browser, url: str) -> None:
    page.open(url)
    page.until("return document.getElementById('model').textContent === 'small'")
    page.run("document.querySelectorAll('details').forEach(one => one.open = true)")
    page.write("#tokens", "40")
    page.write("#temperature", "0")


@in_browser
@pytest.mark.ring
def test_the_page_in_a_real_browser(store, tmp_path):
    with serving(store, tmp_path) as server, webdriver.window(tmp_path / "profile") as page:
        opened(page, server.url)
        page.click("#mode-text")
        page.write("#prompt", "Once upon a time")
        page.click("#go")
        page.until(NOTED)
        text = page.run("return document.getElementById('text').textContent")
        layers = page.until("return document.getElementById('layers').rows.length")
        rows = page.run(ROWS)
        tiles = page.run("return [...document.querySelectorAll('.tile b')].map(b => b.textContent)")
        workers = page.run(
            "return [...document.querySelectorAll('#workers tr')].map(r => r.cells[0].textContent)"
        )
        strip = page.run("return document.getElementById('strip').children.length")
        if picture := os.environ.get("FLASHRING_SCREENSHOT"):
            page.screenshot(Path(picture))
        with Client(server.endpoint) as client:
            assert text == client.generate("Once upon a time", max_new_tokens=40).read()
        assert severe(page) == []
    assert layers == strip == 3
    assert all(int(row[1]) > 0 for row in rows)  # hits
    assert all(int(row[4]) >= int(row[5]) > 0 for row in rows)  # predicted and active neurons a token
    assert float(tiles[0]) > 0
    assert workers == ["predictor", "cache", "prefetcher", "compute"]
    assert tiles[5].endswith("MB")  # memory


@in_browser
@pytest.mark.ring
def test_the_page_converses_and_is_readable_on_a_phone(store, tmp_path):
    with serving(store, tmp_path) as server, webdriver.window(tmp_path / "profile") as page:
        opened(page, server.url)
        page.write("#prompt", "one two")
        page.click("#go")
        page.until(NOTED)
        first = page.run(SAID)
        page.write("#prompt", "three")
        page.click("#go")
        page.until("return document.querySelectorAll('.message').length === 4")
        page.until(NOTED)
        second = page.run(SAID)

        page.click("#again")  # the last answer once more: the same, at temperature 0
        page.until(NOTED)
        assert page.run(SAID) == second
        with Client(server.endpoint) as client:
            asked = [{"role": role, "content": said} for role, said in second[:3]]
            assert client.chat(asked, max_new_tokens=40, temperature=0).read() == second[3][1]

        page.click(".message.assistant .copy")
        page.until("return document.querySelector('.message.assistant .copy').textContent === 'Copied'")
        page.open(server.url)  # the conversation is there when the page comes again
        page.until("return document.querySelectorAll('.message').length === 4")
        assert page.run(SAID) == second

        page.run("document.querySelectorAll('details').forEach(one => one.open = true)")
        page.write("#tokens", "100000")
        page.write("#prompt", "go on")
        page.click("#go")
        page.until("return document.getElementById('text') && document.getElementById('text').textContent")
        page.click("#stop")
        page.until("return document.getElementById('stop').disabled")
        page.click("#clear")
        assert page.run(SAID) == []

        page.ask("POST", "/goog/cdp/execute", {
            "cmd": "Emulation.setDeviceMetricsOverride",
            "params": {"width": 360, "height": 740, "deviceScaleFactor": 2, "mobile": True},
        })  # fmt: skip
        page.ask("POST", "/goog/cdp/execute", {
            "cmd": "Emulation.setEmulatedMedia",
            "params": {"features": [{"name": "prefers-color-scheme", "value": "dark"}]},
        })  # fmt: skip
        assert page.run("return document.documentElement.scrollWidth <= 360")  # nothing beyond the edge
        background, ink = page.run(
            "const style = getComputedStyle(document.getElementById('prompt'));"
            "return [style.backgroundColor, style.color]"
        )
        assert brightness(ink) - brightness(background) > 100
        assert severe(page) == []
    assert [role for role, _ in second] == ["user", "assistant", "user", "assistant"]
    assert second[:2] == first


def brightness(color: str) -> float:
    """Of CSS's rgb(…), 0 to 255."""
    return sum(float(part) for part in re.findall(r"[\d.]+", color)[:3]) / 3
