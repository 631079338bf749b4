"""Who asks during a long run, and what they must get: the right text, its beginning, or an honest error.

Every prompt of the pool has been answered once before anything goes wrong. From then on an answer that says
that it is whole must be that text, and one that was left or cut must be its beginning.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import random
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from pipeline.serving.client import Client
from storage.errors import FlashringError
from workers.lab.bench.soak.running import Running

PROMPTS = 32
WORDS = [
    "Once",
    "upon",
    "a",
    "time",
    "there",
    "was",
    "little",
    "girl",
    "boy",
    "dog",
    "cat",
    "bear",
    "who",
    "wanted",
    "to",
    "play",
    "in",
    "the",
    "garden",
    "with",
    "her",
    "friend",
    "big",
    "red",
    "ball",
    "and",
    "then",
    "they",
    "saw",
    "something",
    "very",
    "sad",
    "happy",
    "mother",
    "said",
    "you",
    "can",
    "share",
    "my",
    "toys",
]
TIMEOUT = 120.0  # seconds; much more than any death costs


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt of the pool, and how it is to be continued."""

    prompt: str
    tokens: int
    seed: int
    temperature: float

    def options(self) -> dict[str, Any]:
        return {
            "max_new_tokens": self.tokens,
            "seed": self.seed,
            "temperature": self.temperature,
            "top_p": 0.95,
            "ignore_eos": True,
        }

    def body(self, stream: bool) -> dict[str, Any]:
        """For `/v1/completions`."""
        own = {"prompt": self.prompt, "stream": stream, "max_tokens": self.tokens, "seed": self.seed}
        return {**own, "temperature": self.temperature, "top_p": 0.95, "ignore_eos": True}


def pool(seed: int) -> list[Question]:
    """Random prompts of random lengths."""
    draw = random.Random(seed)
    return [
        Question(
            " ".join(draw.choices(WORDS, k=draw.randint(2, 60))),
            draw.randint(4, 80),
            draw.randrange(1 << 20),
            draw.choice([0.0, 0.7, 1.0]),
        )
        for _ in range(PROMPTS)
    ]


def answers(server: Running, questions: Sequence[Question]) -> dict[Question, str]:
    """The right text of each question, while nothing is wrong."""
    with Client(server.endpoint, timeout=TIMEOUT) as client:
        return {one: client.generate(one.prompt, **one.options()).read() for one in questions}


def quantiles(values: Sequence[float]) -> dict[str, Any]:
    ordered = sorted(values)
    if not ordered:
        return {}
    return {
        "answers": len(ordered),
        **{
            name: round(ordered[min(len(ordered) - 1, int(share * len(ordered)))], 3)
            for name, share in (("p50", 0.5), ("p90", 0.9), ("p99", 0.99))
        },
    }


class Tally:
    """How answers ended; shared by all clients."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.ends: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.waits: list[float] = []  # seconds from question to first piece

    def ended(self, how: str) -> None:
        with self._lock:
            self.ends[how] += 1

    def waited(self, seconds: float) -> None:
        with self._lock:
            self.waits.append(seconds)

    def check(self, kind: str, text: str, right: str, whole: bool) -> None:
        """Count an answer, and keep one that is not what it should be."""
        if text == right if whole else right.startswith(text):
            self.ended(f"{kind}: {'whole' if whole else 'its beginning'}")
            return
        with self._lock:
            self.ends[f"{kind}: WRONG"] += 1
            self.wrong.append(f"{kind}: {text[:80]!r} instead of {right[:80]!r}")


@dataclass(slots=True)
class Crowd:
    """All clients of a run."""

    server: Running
    questions: list[Question]
    right: dict[Question, str]
    tally: Tally
    ended: threading.Event

    def start(self, kinds: dict[str, int]) -> list[threading.Thread]:
        """So many clients of each kind."""
        threads = []
        for kind, count in kinds.items():
            for number in range(count):
                draw = random.Random(f"{kind} {number}")
                name = f"{kind}-{number}"
                threads.append(threading.Thread(target=self._live, args=(kind, draw), name=name))
        for thread in threads:
            thread.start()
        return threads

    def _live(self, kind: str, draw: random.Random) -> None:
        ask: Callable[[Question, random.Random], None] = KINDS[kind].__get__(self)
        while not self.ended.is_set():
            question = draw.choice(self.questions)
            try:
                ask(question, draw)
            except FlashringError as error:
                self.tally.ended(f"{kind}: {type(error).__name__}")
            except (OSError, http.client.HTTPException) as error:
                self.tally.ended(f"{kind}: connection {type(error).__name__}")
            except Exception:
                self.tally.wrong.append(f"{kind}: {traceback.format_exc(limit=2)}")
            self.ended.wait(draw.random() * 0.3)

    # -- kinds -----------------------------------------------------------------------------------

    def zeromq(self, question: Question, draw: random.Random) -> None:
        """Reads a whole answer."""
        begun = time.monotonic()
        with Client(self.server.endpoint, timeout=TIMEOUT) as client:
            answer = client.generate(question.prompt, **question.options())
            text = ""
            try:
                for piece in answer:
                    if not text:
                        self.tally.waited(time.monotonic() - begun)
                    text += piece
            except FlashringError:
                self.tally.check("zeromq", text, self.right[question], whole=False)
                raise
            self.tally.check("zeromq", text, self.right[question], whole=True)

    def leaver(self, question: Question, draw: random.Random) -> None:
        """Leaves in mid-answer: cancels, or is gone without a word."""
        client, text = Client(self.server.endpoint, timeout=TIMEOUT), ""
        with contextlib.closing(client):
            answer = client.generate(question.prompt, **question.options())
            for piece in answer:
                text += piece
                if draw.random() < 0.2:
                    break
            if draw.random() < 0.5:
                answer.close()
        self.tally.check("leaver", text, self.right[question], whole=False)

    def slow(self, question: Question, draw: random.Random) -> None:
        """Reads a piece now and then."""
        text = ""
        with Client(self.server.endpoint, timeout=TIMEOUT) as client:
            for piece in client.generate(question.prompt, **question.options()):
                text += piece
                if self.ended.wait(0.2):
                    break
            else:
                self.tally.check("slow", text, self.right[question], whole=True)
                return
        self.tally.check("slow", text, self.right[question], whole=False)

    def http(self, question: Question, draw: random.Random) -> None:
        """A whole answer in one body."""
        status, body = self._post(question.body(stream=False)).whole()
        if status != 200:
            self.tally.ended(f"http: status {status} {json.loads(body)['error']['code']}")
            return
        self.tally.check("http", json.loads(body)["choices"][0]["text"], self.right[question], whole=True)

    def stream(self, question: Question, draw: random.Random) -> None:
        """A stream, read to its end, slowly, or left in the middle."""
        leaves, rests = draw.random() < 0.3, draw.random() < 0.3
        text, whole = "", False
        with contextlib.closing(self._post(question.body(stream=True))) as answer:
            if answer.response.status != 200:
                self.tally.ended(f"stream: status {answer.response.status}")
                return
            for event in answer.events():
                if event == "[DONE]":
                    whole = True
                    break
                data = json.loads(event)
                if "error" in data:
                    self.tally.ended(f"stream: error {data['error']['code']}")
                    break
                text += data["choices"][0]["text"] if data["choices"] else ""
                if leaves and draw.random() < 0.1:
                    break
                if rests:
                    self.ended.wait(0.1)
        self.tally.check("stream", text, self.right[question], whole)

    def _post(self, body: dict[str, Any]) -> _Http:
        return _Http(self.server.url, body)


KINDS: dict[str, Any] = {
    name: getattr(Crowd, name) for name in ("zeromq", "leaver", "slow", "http", "stream")
}


class _Http:
    """One request on a connection of its own."""

    def __init__(self, url: str, body: dict[str, Any]) -> None:
        place = urlsplit(url)
        self._connection = http.client.HTTPConnection(place.hostname or "", place.port, timeout=TIMEOUT)
        try:
            data = json.dumps(body)
            self._connection.request("POST", "/v1/completions", data, {"Content-Type": "application/json"})
            self.response = self._connection.getresponse()
        except BaseException:
            self._connection.close()
            raise

    def whole(self) -> tuple[int, bytes]:
        with contextlib.closing(self):
            return self.response.status, self.response.read()

    def events(self) -> Any:
        """The data of each event."""
        while line := self.response.readline():
            if line.startswith(b"data: "):
                yield line.removeprefix(b"data: ").decode().strip()

    def close(self) -> None:
        self._connection.close()
