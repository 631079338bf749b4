"""`chat`: a conversation on a terminal, or line by line through a pipe.

Answers go to standard output, everything else to standard error. On a terminal what goes wrong is said, and
the conversation goes on; in a pipe it ends the command.
"""

from __future__ import annotations

import contextlib
import json
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer

from pipeline.commands.generate import describe, tell_plan, viewer_of
from pipeline.commands.options import (
    Bits,
    ChatTemplateFile,
    ConfigFile,
    Context,
    Device,
    DeviceMemory,
    JsonSchema,
    Memory,
    Model,
    Quality,
    Quiet,
    Seed,
    Settings,
    Temperature,
    TimelineFile,
    TopK,
    TopP,
    Verbose,
    Verify,
    Watch,
)
from pipeline.config import Values
from pipeline.console import always_say, say, write
from pipeline.directories import check_writable
from pipeline.ending import asked_to_end
from pipeline.errors import RingGaveUp
from pipeline.first_dial import prepared
from pipeline.models.names import configure
from pipeline.planner.divide import plan
from pipeline.ring.grammar import read_schema
from pipeline.serving.answer import RequestOptions
from pipeline.serving.chat import require_template
from pipeline.serving.dialogue import Dialogue
from pipeline.serving.warm_ring import WarmRing
from pipeline.tracing.recording import Recording
from pipeline.watching.waits import Plain, Viewer
from pipeline.watching.watch import FRAME_SECONDS
from storage import files
from storage.errors import FlashringError, UsageError

PROMPT = "> "
COMMANDS = {
    "/reset": "begin a new conversation",
    "/system TEXT": "tell the model how to behave; without TEXT: no longer",
    "/save FILE": "write the messages as JSON",
    "/stats": "figures of the last answer",
    "/help": "this list",
    "/quit": "end; Ctrl-D does, too",
}


def command(
    model: Model = "",
    system: Annotated[
        str, typer.Option(help="Tell the model how to behave.", metavar="TEXT", show_default=False)
    ] = "",
    memory: Memory = "",
    device: Device = "",
    device_memory: DeviceMemory = "",
    bits: Bits = None,
    quality: Quality = "",
    verify: Verify = "",
    context_tokens: Context = 0,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            help="Cut an answer after this many tokens. [default: when the context is full]",
            show_default=False,
        ),
    ] = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    seed: Seed = 0,
    chat_template: ChatTemplateFile = None,
    json_schema: JsonSchema = None,
    config_file: ConfigFile = None,
    settings: Settings = None,
    timeline: TimelineFile = None,
    watch: Watch = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Converse with a model.

    Ctrl-C ends an answer, and /help lists what else there is. In a pipe every line is a message.
    """
    schema = read_schema(json_schema).text if json_schema else None
    values: Values = {
        "model": {"bits": bits},
        "predictor": {"quality": quality or None},
        "storage": {"verify": verify or None},
        "memory": {"budget": memory or None},
        "compute": {
            "context": context_tokens or None,
            "device": device or None,
            "device_memory": device_memory or None,
            "structured": True if schema else None,
        },
        "sampling": {
            "max_new_tokens": max_new_tokens,
            "temperature": temperature,
            "top_p": top_p,
            "top_k": top_k,
        },
    }
    source, config = configure(model, config_file, settings or (), values)
    store = source.open_store()
    config = prepared(source, store, config)
    report = plan(store, config)
    template = require_template(store, chat_template)
    tell_plan(store, config, report, verbose=verbose)

    from pipeline.ring.session import Session

    viewers: list[Viewer] = []

    def open_session() -> Session:
        session = Session(store, report.config, report.plan, budget=report.budget)
        session.reuse_prefix = True
        viewers[:] = [viewer_of(session, store, watch=watch)]
        return session

    def figures() -> str:
        session = ring.session
        return describe(session.summary()) if isinstance(session, Session) else ""

    context = report.plan.context
    whole = "max_new_tokens" not in config.sampling.model_fields_set
    options: RequestOptions = {
        "seed": seed,
        "max_new_tokens": context if whole else None,
        "json_schema": schema,
    }
    with Recording(timeline, say) as recording:
        recording.of(store, report.plan)
        ring = WarmRing(open_session, template, report.config.sampling, say=say, state=store.state)
        ring.live_seconds = FRAME_SECONDS if watch else 0.0
        dialogue = Dialogue(ring, template, context, options)
        try:
            with _abandoned_when_asked_to_end(ring):
                dialogue.instruct(system)
                talk = Talk(dialogue, ring.abandon, figures, lambda: viewers[-1], chatty=verbose)
                talk.run(store.manifest.name)
        finally:
            ring.close()


class Talk:
    """Between whoever types, or a pipe, and a dialogue."""

    def __init__(
        self,
        dialogue: Dialogue,
        abandon: Callable[[], None],
        figures: Callable[[], str],
        viewer: Callable[[], Viewer] = Plain,
        *,
        chatty: bool = False,
    ) -> None:
        """`abandon`: called before the program ends in mid-answer; `chatty`: figures after every answer.

        `viewer`: of the session that answers, which lets the text through.
        """
        self._dialogue = dialogue
        self._abandon = abandon
        self._figures = figures
        self._viewer = viewer
        self._chatty = chatty
        self._interactive = sys.stdin is not None and sys.stdin.isatty()

    def run(self, name: str) -> None:
        """Until the input ends."""
        if self._interactive:
            say(f"{name} listens; /help lists what else there is than messages, /quit ends")
        for line in _lines(self._interactive):
            try:
                if line.startswith("/") and not line.startswith("//"):
                    if not self._obey(*line.split(maxsplit=1)):
                        return
                else:
                    self._answer(line.removeprefix("/"))
            except RingGaveUp:
                raise
            except FlashringError as error:
                if not self._interactive:
                    raise
                always_say(str(error))

    def _obey(self, command: str, text: str = "") -> bool:
        """Do what a command says; whether to go on. Raises UsageError for one that is none."""
        match command:
            case "/quit":
                return False
            case "/reset":
                self._dialogue.reset()
                say("a new conversation")
            case "/system":
                self._dialogue.instruct(text)
                say("the model is told that from now on" if text else "the model is told nothing of the kind")
            case "/save":
                self._save(text)
            case "/stats":
                self._tell_figures()
            case "/help":
                for name, meaning in COMMANDS.items():
                    always_say(f"{name:<14}{meaning}")
                always_say("A message that begins with a slash is written with two.")
            case _:
                known = ", ".join(name.split()[0] for name in COMMANDS)
                raise UsageError(f"there is no {command}, only {known}; write // for a message with a slash")
        return True

    def _answer(self, question: str) -> None:
        with _Interrupts(self._abandon, forgiving=self._interactive) as interrupts:
            empty = True
            try:
                with contextlib.closing(self._dialogue.ask(question, lambda: interrupts.seen)) as pieces:
                    for piece in pieces:
                        empty = empty and not piece
                        self._viewer().piece(piece)
            finally:
                self._viewer().end()
                if not empty:
                    write("\n")
        if interrupts.seen:
            say(
                "[interrupted]" if not empty else "[interrupted before the answer: the question is forgotten]"
            )
        elif cut := self._dialogue.cut():
            say(cut)
        if self._chatty:
            self._tell_figures()

    def _tell_figures(self) -> None:
        found = self._dialogue.figures()
        if not found:
            say("there was no answer yet")
            return
        say(self._figures())
        say(found)

    def _save(self, name: str) -> None:
        if not name:
            raise UsageError("/save takes the name of a file")
        file = Path(name).expanduser()
        check_writable(file)
        messages = [dict(message) for message in self._dialogue.messages]
        text = json.dumps(messages, ensure_ascii=False, indent=2) + "\n"
        try:
            files.write_whole(file, text.encode())
        except OSError as error:
            raise UsageError(f"{file} cannot be written: {error.strerror}") from error
        say(f"wrote {len(messages)} messages to {file}")


class _Interrupts:
    """Around an answer: the first Ctrl-C is only noted, if it is forgiven; the next ends the program."""

    def __init__(self, abandon: Callable[[], None], *, forgiving: bool) -> None:
        self.seen = False
        self._abandon = abandon
        self._forgiving = forgiving

    def __enter__(self) -> _Interrupts:
        self._before = signal.signal(signal.SIGINT, self._interrupt)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        if self.seen or not self._forgiving:
            self._abandon()
            raise KeyboardInterrupt
        self.seen = True


@contextlib.contextmanager
def _abandoned_when_asked_to_end(ring: WarmRing) -> Iterator[None]:
    """SIGTERM and SIGHUP end the command at once, without the token in work."""

    def end(number: int, frame: FrameType | None) -> None:
        ring.abandon()
        raise KeyboardInterrupt

    before = {number: signal.signal(number, end) for number in asked_to_end()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _lines(interactive: bool) -> Iterator[str]:
    """What is typed, or comes through the pipe, without empty lines. Raises UsageError for no UTF-8."""
    if sys.stdin is None:  # closed
        return
    edited = interactive and sys.stdout.isatty()
    if edited:
        with contextlib.suppress(ImportError):  # a Python may come without it
            import readline  # noqa: F401 - gives `input` its line editing
    while True:
        try:
            if edited:
                line = input(PROMPT)
            else:
                if interactive:
                    print(PROMPT, end="", file=sys.stderr, flush=True)
                line = sys.stdin.readline()
                if not line:
                    raise EOFError
        except EOFError:
            if interactive:
                say("")  # what comes next begins a line of its own
            return
        except UnicodeDecodeError:
            raise UsageError("a chat message is not valid UTF-8") from None
        if line.strip():
            yield line.strip()
