"""Many clients at once: answers are not mixed up, refusals are clean, and nobody holds up the others."""

from __future__ import annotations

import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from fake_session import FastSession, GatedSession, text_of
from serving import served

from pipeline import Client
from pipeline.errors import QueueFull

CLIENTS, QUEUE = 200, 64


def test_two_hundred_clients_on_a_queue_of_sixty_four(tmp_path: Path) -> None:
    """All ask while the ring is busy: it takes as many as may wait, and refuses the rest at once."""
    session = GatedSession()
    asked = threading.Barrier(CLIENTS, timeout=120)

    def ask(number: int) -> str:
        with Client(server.endpoint, timeout=120) as client:
            assert client.server.model == "fake"  # connected, before anybody asks
            asked.wait()
            try:
                return client.generate(f"client {number}", max_new_tokens=3, seed=number).read()
            except QueueFull as error:
                return f"refused: {error}"

    with served(tmp_path, lambda: session, queue_limit=QUEUE) as server, Client(server.endpoint) as first:
        running = first.generate("first", max_new_tokens=3)  # so that the ring is busy
        assert session.started.wait(60)
        with ThreadPoolExecutor(CLIENTS) as pool:
            answers = [pool.submit(ask, number) for number in range(CLIENTS)]
            refused = CLIENTS - QUEUE
            server.until(lambda: server.scheduler.observer.requests["queue-full"] == refused, 120.0)
            session.let(3 * (QUEUE + 1))
            texts = [answer.result(120) for answer in answers]
        assert running.read() == text_of("first", max_new_tokens=3)
        values = server.ask(server.scheduler.observer.values)
    found = Counter("refused" if text.startswith("refused") else "answered" for text in texts)
    assert found == {"answered": QUEUE, "refused": refused}
    for number, text in enumerate(texts):
        right = text_of(f"client {number}", max_new_tokens=3, seed=number)
        assert text == right or text.startswith("refused: ")
    assert values["requests.length"] == QUEUE + 1
    assert values["dropped_clients"] == 0


def test_who_was_refused_may_ask_again(tmp_path: Path) -> None:
    """With patience everybody is answered, and rightly."""

    def ask(number: int) -> bool:
        with Client(server.endpoint, timeout=120) as client:
            while True:
                try:
                    got = client.generate(f"client {number}", max_new_tokens=2, seed=number).read()
                except QueueFull:
                    continue
                return got == text_of(f"client {number}", max_new_tokens=2, seed=number)

    with served(tmp_path, FastSession, queue_limit=8) as server, ThreadPoolExecutor(40) as pool:
        assert all(pool.map(ask, range(40)))


def test_a_client_that_floods_holds_up_nobody(tmp_path: Path) -> None:
    """It fills the queue; another's one request comes in its turn, for clients are served in turn."""
    session = GatedSession()
    with (
        served(tmp_path, lambda: session, queue_limit=QUEUE) as server,
        Client(server.endpoint) as flood,
        Client(server.endpoint) as other,
    ):
        flooding = [flood.generate("flood", max_new_tokens=2) for _ in range(QUEUE - 2)]
        server.until(lambda: server.scheduler.waiting >= QUEUE - 3)
        answer = other.generate("other", max_new_tokens=2)
        server.until(lambda: server.scheduler.waiting >= QUEUE - 2)
        session.let(6)  # two of the flood's, and the other's: clients take turns
        assert answer.read() == text_of("other", max_new_tokens=2)
        assert session.runs <= 4  # the next has begun, maybe
        session.let(2 * QUEUE)
        assert {one.read() for one in flooding} == {text_of("flood", max_new_tokens=2)}
