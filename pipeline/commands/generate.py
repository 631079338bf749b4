"""Run language models that are larger than memory.

With --prompt it continues a text. The commands below do everything else; each has a --help of its own.
"""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated

import typer

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
from pipeline.config import Config, Values
from pipeline.console import say, size, write, write_json
from pipeline.ending import asked_to_end
from pipeline.first_dial import prepared
from pipeline.models.names import configure, find_source
from pipeline.planner import locality
from pipeline.planner.afterwards import planned_beside
from pipeline.planner.decoding import describe as describe_sampling
from pipeline.planner.divide import PlanReport, plan
from pipeline.planner.probe import probe_rate, why_dense
from pipeline.quality import describe as describe_quality
from pipeline.ring.audit import AUDIT_EVERY
from pipeline.ring.grammar import Grammar, read_schema
from pipeline.serving.chat import has_template, require_template
from pipeline.tracing.recording import Recording
from pipeline.version import name_and_version
from pipeline.watching.waits import Viewer, Waits
from pipeline.watching.watch import Watch as Watcher
from storage.errors import UsageError
from storage.rounding import read_cost
from storage.store import Store

if TYPE_CHECKING:
    from pipeline.ring.generation import GenerationParams
    from pipeline.ring.request import Request
    from pipeline.ring.session import Session
    from pipeline.ring.summary import Summary
    from pipeline.serving.chat import ChatTemplate


def _print_version(asked: bool) -> None:
    if asked:
        write(name_and_version() + "\n")
        raise typer.Exit


Text = Annotated[
    str | None,
    typer.Option(
        "--prompt",
        help="The text to continue; - reads it from standard input.",
        metavar="TEXT",
        show_default=False,
    ),
]


def command(
    context: typer.Context,
    prompt: Text = None,
    model: Model = "",
    memory: Memory = "",
    device: Device = "",
    device_memory: DeviceMemory = "",
    bits: Bits = None,
    quality: Quality = "",
    verify: Verify = "",
    context_tokens: Context = 0,
    max_new_tokens: Annotated[
        int | None, typer.Option(help="Stop after this many tokens. [default: 200]", show_default=False)
    ] = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    seed: Seed = 0,
    config_file: ConfigFile = None,
    settings: Settings = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Ask the prompt as a question, through the model's chat template.")
    ] = False,
    chat_template: ChatTemplateFile = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object instead of the text.")
    ] = False,
    json_schema: JsonSchema = None,
    force_tokens: Annotated[
        Path | None,
        typer.Option(
            help="Decode this file's token ids, separated by spaces, instead of sampled ones.",
            metavar="FILE",
        ),
    ] = None,
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos", help="Go on after an end-of-text token.")
    ] = False,
    draft: Annotated[
        str,
        typer.Option(
            help="Verify several tokens a step, where every neuron is read: lookup takes them from the text "
            "itself, a smaller model with the same tokenizer writes them, off leaves it. The text stays the "
            "same. [default: lookup, where tokens read from flash]",
            metavar="lookup|off|NAME|DIR",
            show_default=False,
        ),
    ] = "",
    audit_sets: Annotated[
        bool, typer.Option("--audit", help="Check predicted sets against the true ones; --json shows them.")
    ] = False,
    timeline: TimelineFile = None,
    watch: Watch = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    version: Annotated[
        bool,
        typer.Option("--version", help="Print the version, and end.", callback=_print_version, is_eager=True),
    ] = False,
) -> None:
    """Continue a text with a model larger than memory."""
    if context.invoked_subcommand is not None:
        if prompt is not None:
            raise UsageError(f"--prompt does not go together with the command {context.invoked_subcommand}")
        return
    if prompt is None:
        raise UsageError('nothing to do: give --prompt "Once upon a time", or see --help')
    if prompt == "-":
        prompt = _from_standard_input()
    if not prompt:
        raise UsageError("the prompt is empty")
    forced = _read_tokens(force_tokens) if force_tokens else ()
    grammar = Grammar.of_schema(read_schema(json_schema)) if json_schema else None
    values: Values = {
        "model": {"bits": bits},
        "predictor": {"quality": quality or None},
        "storage": {"verify": verify or None},
        "memory": {"budget": memory or None},
        "compute": {
            "context": context_tokens or None,
            "device": device or None,
            "device_memory": device_memory or None,
            "audit": AUDIT_EVERY if audit_sets else None,
            "structured": True if grammar else None,
        },
        "drafts": _draft_values(draft),
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
    params = _params(report.config, seed, ignore_eos, forced, grammar)
    template = require_template(store, chat_template) if chat or chat_template else None
    if template is None and has_template(store):
        say(f"{store.manifest.name} is made for conversation: see --chat, and run.py chat")
    # Before the ring starts, which can take a while.
    request = _request(prompt, template, params, store, report)
    tell_plan(store, config, report, verbose=verbose)
    shown = prompt if template is None else ""
    with Recording(timeline, say) as recording:
        recording.of(store, report.plan)
        summary = _generate(store, report, shown, request, silent=as_json, watch=watch)
    if verbose:
        for note in summary.notes:
            say(note)
        for line in planned_beside(store, report, summary):
            say(line)
    locality.keep(store, report.plan, summary)
    if as_json:
        write_json(summary.to_json())
    else:
        say(describe(summary))
        if summary.audit is not None:
            say(summary.audit.describe())


def _from_standard_input() -> str:
    """All of it, without the line's end that echo and editors put behind a text."""
    try:
        return "" if sys.stdin is None else sys.stdin.read().removesuffix("\n")
    except UnicodeDecodeError as error:
        raise UsageError(f"standard input cannot be read as text: {error}") from error


def _draft_values(draft: str) -> dict[str, str | None]:
    """What `--draft` means. Raises UsageError for a model that is not there."""
    if draft in ("", "lookup", "off", "auto"):
        return {"kind": draft or None}
    return {"kind": "model", "model": str(find_source(draft).open_store().path.resolve())}


def _generate(
    store: Store,
    report: PlanReport,
    shown: str,
    request: Request,
    *,
    silent: bool,
    watch: bool,
) -> Summary:
    """Run one generation, streaming its text unless `silent`; returns the session's summary.

    A terminal shows the text after `shown`, the prompt that it continues.
    """
    from pipeline.ring.session import Session

    with Session(store, report.config, report.plan, budget=report.budget) as session:
        _abandon_when_interrupted(session)
        viewer = viewer_of(session, store, watch=watch)
        if sys.stdout.isatty() and not silent:
            viewer.piece(shown)  # for people; a pipe gets the continuation alone
        try:
            for piece in session.texts(request):
                if not silent:
                    viewer.piece(piece)
        finally:
            viewer.end()
        if not silent:
            write("\n")
        return session.summary()


def viewer_of(session: Session, store: Store, *, watch: bool) -> Viewer:
    """What looks at the session's generations from now on."""
    ceiling = probe_rate(store) if watch and not session.plan.whole else 0.0
    viewer: Viewer = Watcher(session, ceiling) if watch else Waits(session)
    session.look = viewer
    return viewer


def _abandon_when_interrupted(session: Session) -> None:
    """Ctrl-C and SIGTERM end the command at once, wherever they arrive.

    Leaving the session's iterator would first wait for the token in work, which may take long.
    """

    def interrupt(number: int, frame: FrameType | None) -> None:
        session.abandoned = True
        raise KeyboardInterrupt

    for number in (signal.SIGINT, *asked_to_end()):
        signal.signal(number, interrupt)


def _params(
    config: Config, seed: int, ignore_eos: bool, forced: tuple[int, ...], grammar: Grammar | None
) -> GenerationParams:
    from pipeline.ring.generation import GenerationParams

    params = GenerationParams(
        max_new_tokens=len(forced) or config.sampling.max_new_tokens,
        sampling=config.sampling.with_seed(seed),
        ignore_eos=ignore_eos or bool(forced),
        forced=forced,
        grammar=grammar,
    )
    params.check()
    return params


def _request(
    prompt: str, template: ChatTemplate | None, params: GenerationParams, store: Store, report: PlanReport
) -> Request:
    """The prompt, or with a template the question that it asks."""
    from pipeline.ring.request import Request
    from storage.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(store)
    ids = None
    if template is not None:  # which writes the special tokens itself
        question = template.render([{"role": "user", "content": prompt}])
        ids = tokenizer.encode(question, add_special_tokens=False).ids
    return Request.of(prompt if ids is None else ids, params, tokenizer, store, report.plan)


def _read_tokens(file: Path) -> tuple[int, ...]:
    try:
        tokens = tuple(int(word) for word in file.read_text(encoding="utf-8").split())
    except OSError as error:
        raise UsageError(f"the token file {file} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise UsageError(f"the token file {file} must hold token ids separated by spaces") from error
    if not tokens:
        raise UsageError(f"the token file {file} is empty")
    return tokens


def tell_plan(store: Store, config: Config, report: PlanReport, *, verbose: bool) -> None:
    """Say how a ring will work before it starts; `config` as it was before the plan."""
    if verbose or config.memory.budget:
        for line in report.lines:
            say(line)
    if verbose:
        say(describe_sampling(store, config))
    if (cost := read_cost(store)) is not None:
        say(cost.describe())
    if line := describe_quality(store, report.config):
        say(line)
    warn_if_dense(store, report)


def warn_if_dense(store: Store, report: PlanReport) -> None:
    """Say before the first token what a token costs when every neuron is needed."""
    if not report.plan.forecast.every:
        return
    streamed = report.streamed_bytes
    if not streamed:
        return
    rate = probe_rate(store)
    say(
        f"{store.manifest.name} {why_dense(store, report.config)}: every token reads "
        f"{streamed / 1e9:.3g} GB from flash, about {streamed / rate:.2g} s a token at "
        f"{rate / 1e9:.2g} GB/s"
    )


def describe(summary: Summary) -> str:
    """The one-line summary of a generation."""
    cache = summary.cache
    asked = cache.hits + cache.misses
    hit_rate = f"{100 * cache.hits / asked:.1f} %" if asked else "no lookups"
    drafts = summary.drafts
    drafted = f", {drafts.accepted} of {drafts.drafted} drafts accepted" if drafts.drafted else ""
    lossy = f", lossy: {', '.join(summary.lossy)}" if summary.lossy else ""
    return (
        f"[{summary.generated_tokens} tokens, {summary.tokens_per_second:.1f} tokens/s, "
        f"{summary.flash.bytes_per_token / 1e6:.2f} MB read per token, hit rate {hit_rate}, "
        f"peak memory {size(summary.memory.peak_bytes)}{drafted}{lossy}]"
    )
