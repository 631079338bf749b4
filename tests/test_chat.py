"""`chat` and `--chat`: history, commands, interrupts, on a terminal and through a pipe."""

from __future__ import annotations

import io
import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from checkpoints import write_checkpoint
from fake_session import CONTEXT, DyingSession, FastSession
from serving import TEMPLATE

from pipeline import cli
from pipeline.commands.chat import Talk
from pipeline.serving.chat import ChatTemplate
from pipeline.serving.dialogue import Dialogue
from pipeline.serving.warm_ring import WarmRing
from storage.convert import convert
from storage.errors import UsageError
from storage.store import Store

ROOT = Path(__file__).resolve().parent.parent
RUN = [sys.executable, str(ROOT / "run.py")]
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + TEMPLATE
Here = Callable[..., subprocess.CompletedProcess[str]]  # the fixture `here`


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Of a model with a chat template."""
    base = tmp_path_factory.mktemp("chat")
    checkpoint = write_checkpoint(base / "checkpoint", "opt", "float16")
    (checkpoint / "chat_template.jinja").write_text(TEMPLATE)
    return convert(checkpoint, base / "store", name="chatty")


@pytest.fixture
def session() -> FastSession:
    return FastSession()


def dialogue(
    session: FastSession, template: str = TEMPLATE, context: int = CONTEXT, tokens: int = 3
) -> Dialogue:
    ring = WarmRing(lambda: session, ChatTemplate(template, {}))
    return Dialogue(ring, ChatTemplate(template, {}), context, {"max_new_tokens": tokens})


def prompts(session: FastSession) -> list[str]:
    return [bytes(ids).decode() for ids in session.prompts]


def test_every_turn_repeats_what_was_said(session: FastSession) -> None:
    talk = dialogue(session)
    first = "".join(talk.ask("Hi"))
    second = "".join(talk.ask("And?"))
    turns = f"<user>Hi\n<assistant>{first}\n"
    assert prompts(session) == ["<user>Hi\n<assistant>", f"{turns}<user>And?\n<assistant>"]
    roles = ["user", "assistant", "user", "assistant"]
    assert [(one["role"], one["content"]) for one in talk.messages] == list(
        zip(roles, ["Hi", first, "And?", second], strict=True)
    )
    talk.reset()
    assert talk.messages == []
    assert "".join(talk.ask("Hi")) == first


def test_the_systems_message_comes_first_and_stays(session: FastSession) -> None:
    talk = dialogue(session)
    talk.instruct("Be brief.")
    list(talk.ask("Hi"))
    talk.reset()
    assert talk.messages == [{"role": "system", "content": "Be brief."}]
    assert prompts(session) == ["<system>Be brief.\n<user>Hi\n<assistant>"]


def test_a_template_without_a_place_for_the_systems_message_keeps_the_conversation(
    session: FastSession,
) -> None:
    talk = dialogue(session, NO_SYSTEM)
    with pytest.raises(UsageError, match="no system"):
        talk.instruct("Be brief.")
    assert "".join(talk.ask("Hi"))


def test_an_interrupted_answer_stays_as_far_as_it_came(session: FastSession) -> None:
    talk = dialogue(session, tokens=50)
    pieces: list[str] = []
    for piece in talk.ask("Hi", lambda: len(pieces) == 2):
        pieces.append(piece)
    assert len(pieces) == 2
    assert talk.messages[1]["content"] == "".join(pieces)
    assert talk.cut() == ""


def test_a_question_without_any_answer_is_forgotten(session: FastSession) -> None:
    talk = dialogue(session)
    assert list(talk.ask("Hi", lambda: True)) == []
    assert talk.messages == []


def test_a_full_context_is_said_and_the_conversation_kept(session: FastSession) -> None:
    talk = dialogue(session, context=100)
    list(talk.ask("Hi"))
    before = talk.messages
    with pytest.raises(UsageError, match=r"context of 100 tokens is full: .* has \d+; /reset .*--context"):
        list(talk.ask("x" * 100))
    assert talk.messages == before
    assert "".join(talk.ask("y"))


def test_why_an_answer_was_cut_is_told(session: FastSession) -> None:
    talk = dialogue(session, tokens=3)
    list(talk.ask("Hi"))
    assert talk.cut() == "the answer was cut after 3 tokens; see --max-new-tokens"
    full = dialogue(session, tokens=CONTEXT)
    list(full.ask("Hi"))
    assert full.cut().startswith("the context of 4,096 tokens is full, and the answer was cut; /reset")
    assert full.figures().startswith("[context 4,096 of 4,096 tokens; 0 of the prompt's 20 were there")


def test_a_message_that_is_no_text_is_refused(session: FastSession) -> None:
    with pytest.raises(UsageError, match="not valid UTF-8"):
        list(dialogue(session).ask("\udcff"))


# -- what is typed ------------------------------------------------------------------------------


class Terminal(io.StringIO):
    """Typed lines; what is written goes on to no terminal."""

    def isatty(self) -> bool:
        return True


Typing = Callable[..., tuple[str, list[str]]]


@pytest.fixture
def typing(session: FastSession, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> Typing:
    """Gives lines to a conversation; what it wrote, and what it said."""

    def typed(*lines: str, terminal: bool = False, **options: Any) -> tuple[str, list[str]]:
        text = "".join(f"{line}\n" for line in lines)
        monkeypatch.setattr(sys, "stdin", Terminal(text) if terminal else io.StringIO(text))
        Talk(dialogue(session, **options), lambda: None, lambda: "[figures]").run("fake")
        told = capsys.readouterr()
        return told.out, told.err.splitlines()

    return typed


def test_a_pipe_gets_the_answers_alone(typing: Typing, session: FastSession) -> None:
    out, said = typing("Hi", "", "  //etc  ")
    assert len(out.splitlines()) == 2
    assert said == ["the answer was cut after 3 tokens; see --max-new-tokens"] * 2
    assert prompts(session)[1].endswith("<user>/etc\n<assistant>")


def test_commands(typing: Typing, session: FastSession, tmp_path: Path) -> None:
    file = tmp_path / "talk.json"
    out, said = typing(
        "/stats", "/system Be brief.", "Hi", "/stats", f"/save {file}", "/reset", "Ho", "/quit", "never"
    )
    assert prompts(session) == [f"<system>Be brief.\n<user>{one}\n<assistant>" for one in ("Hi", "Ho")]
    saved = json.loads(file.read_text())
    assert [one["role"] for one in saved] == ["system", "user", "assistant"]
    assert saved[2]["content"] == out.splitlines()[0]
    assert said[0] == "there was no answer yet"
    assert said[3] == "[figures]"
    assert said[4].startswith("[context 41 of 4,096 tokens; 0 of the prompt's 38 were there already")
    assert said[5] == f"wrote 3 messages to {file}"
    assert said[6] == "a new conversation"


def test_help_names_every_command(typing: Typing) -> None:
    _, said = typing("/help")
    told = "\n".join(said)
    for name in ("/reset", "/system TEXT", "/save FILE", "/stats", "/quit"):
        assert name in told


MISTAKES = [
    ("/rest", "there is no /rest, only /reset, /system"),
    ("/save", "/save takes the name of a file"),
    ("/save /nowhere/talk.json", "/nowhere/talk.json cannot be written: there is no directory"),
    ("x" * CONTEXT, "the context of 4,096 tokens is full"),
]


@pytest.mark.parametrize(("line", "words"), MISTAKES)
def test_a_mistake_ends_a_pipe_and_no_terminal(typing: Typing, line: str, words: str) -> None:
    with pytest.raises(UsageError, match=f"^{words}"):
        typing(line, "Hi")
    out, said = typing(line, "Hi", terminal=True)
    assert out
    assert any(one.removeprefix("> ").startswith(words) for one in said)


def test_a_ring_that_dies_is_begun_again(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    sessions = iter([DyingSession(), FastSession()])
    ring = WarmRing(lambda: next(sessions), ChatTemplate(TEMPLATE, {}))
    talk = Dialogue(ring, ChatTemplate(TEMPLATE, {}), CONTEXT, {"max_new_tokens": 3})
    monkeypatch.setattr(sys, "stdin", Terminal("Hi\nAnd?\n"))
    Talk(talk, ring.abandon, lambda: "").run("fake")
    told = capsys.readouterr()
    assert "killed by SIGKILL" in told.err
    assert [one["role"] for one in talk.messages] == ["user", "assistant"] * 2
    assert len(told.out.splitlines()) == 2


# -- the command --------------------------------------------------------------------------------


def test_a_model_without_a_template_is_refused(tmp_path: Path, here: Here) -> None:
    plain = convert(write_checkpoint(tmp_path / "model"), tmp_path / "store", name="plain")
    for arguments in (["chat"], ["--prompt", "x", "--chat"]):
        done = here(cli.main, *arguments, "--model", plain.path)
        assert (done.returncode, done.stdout) == (2, "")
        sentence = done.stderr.splitlines()[-1]
        assert sentence.startswith("flashring: plain has no chat template: give it one with --chat-template")


def test_a_prompt_that_asks_goes_through_the_template(store: Store, here: Here) -> None:
    """By what does not fit: the template's words count."""
    long = "x" * 120
    asked = here(cli.main, "--prompt", long, "--chat", "--model", store.path)
    assert "the prompt has 138 tokens" in asked.stderr.splitlines()[-1]  # 18 the template's, no leading </s>
    plain = here(cli.main, "--prompt", "x" * 137, "--model", store.path)
    assert "chatty is made for conversation: see --chat, and run.py chat" in plain.stderr
    assert "made for conversation" not in asked.stderr


@pytest.mark.ring
def test_a_pipe_converses_with_a_ring_that_reuses_what_was_said(store: Store, tmp_path: Path) -> None:
    talk = tmp_path / "talk.json"
    lines = ["Hi", "And?", "/stats", f"/save {talk}"]
    options = ["--max-new-tokens", "4", "--context", "128", "-v", "--seed", "3"]
    done = subprocess.run(
        [*RUN, "chat", "--model", str(store.path), *options],
        input="".join(f"{line}\n" for line in lines),
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    saved = json.loads(talk.read_text())
    answers = [one["content"] for one in saved if one["role"] == "assistant"]
    assert done.stdout == "".join(f"{answer}\n" for answer in answers if answer)
    assert "sampling: none, always the likeliest token" in done.stderr
    context = [line for line in done.stderr.splitlines() if line.startswith("[context ")]
    assert "; 0 of the prompt's 20 were there already" in context[0]
    assert "; 0 of" not in context[1]
    assert "tokens/s" in done.stderr


class Pty:
    """A `run.py chat` on a terminal of its own."""

    def __init__(self, store: Store, *options: str) -> None:
        self._master, child = pty.openpty()
        # The terminal's Ctrl-C goes to its foreground group, so the program needs a session of its own.
        self.process = subprocess.Popen(
            [sys.executable, "-c", ON_TERMINAL, *RUN, "chat", "--model", str(store.path), *options],
            stdin=child,
            stdout=child,
            stderr=child,
            start_new_session=True,
            env=os.environ | {"TERM": "dumb"},
        )
        os.close(child)
        self.told = ""

    def type(self, text: str) -> None:
        os.write(self._master, text.encode())

    def until(self, words: str) -> None:
        """Read on until these words, beyond what was read before."""
        self._read(lambda seen: words in seen)

    def more(self, count: int) -> None:
        """Read so many characters more."""
        self._read(lambda seen: len(seen) >= count)

    def _read(self, enough: Callable[[str], bool], seconds: float = 60.0) -> None:
        end, seen = time.monotonic() + seconds, ""
        while not enough(seen):
            ready, _, _ = select.select([self._master], [], [], max(0.0, end - time.monotonic()))
            assert ready, self.told
            try:
                more = os.read(self._master, 1).decode(errors="replace")  # nothing of what comes next
            except OSError:  # the program has ended
                more = ""
            assert more, self.told
            seen += more
            self.told += more

    def close(self) -> None:
        os.close(self._master)  # first, or what nobody reads could hold it up
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        self.process.wait(60)


ON_TERMINAL = """
import fcntl, os, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execv(sys.argv[1], sys.argv[1:])
"""


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Of a model that goes on for as long as a test may take."""
    base = tmp_path_factory.mktemp("endless")
    checkpoint = write_checkpoint(base / "checkpoint", "falcon-7b", "float16")  # rotary: any length will do
    (checkpoint / "chat_template.jinja").write_text(TEMPLATE)
    (checkpoint / "generation_config.json").write_text('{"eos_token_id": []}')
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 1 << 20}))
    return convert(checkpoint, base / "store", name="endless")


@pytest.fixture
def terminal(endless: Store) -> Iterator[Pty]:
    found = Pty(endless, "--context", "20000")
    try:
        yield found
    finally:
        found.close()


@pytest.mark.ring
def test_ctrl_c_ends_the_answer_and_then_the_program(terminal: Pty) -> None:
    terminal.until("> ")
    terminal.type("Hi\n")
    terminal.until("Hi\r\n")
    terminal.more(20)
    terminal.type("\x03")
    terminal.until("[interrupted]\r\n> ")
    terminal.type("/stats\n")
    terminal.until("of 20,000 tokens; 0 of the prompt's 20 were there already")
    terminal.until("> ")
    terminal.type("And?\n")
    terminal.until("And?\r\n")
    terminal.more(20)
    terminal.type("\x03")
    terminal.until("[interrupted]\r\n> ")
    assert terminal.process.poll() is None
    time.sleep(
        0.5
    )  # readline hears no signal between writing its prompt and beginning to wait; people are slower
    terminal.type("\x03")
    terminal.until("flashring: interrupted")
    assert terminal.process.wait(60) == 130


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
@pytest.mark.ring
def test_who_wants_it_gone_need_not_wait_for_the_answer(terminal: Pty, number: signal.Signals) -> None:
    terminal.until("> ")
    terminal.type("Hi\n")
    terminal.until("Hi\r\n")
    terminal.more(20)
    terminal.process.send_signal(number)
    terminal.until("flashring: interrupted")
    assert terminal.process.wait(60) == 130
