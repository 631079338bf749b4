"""What is measured: a store, a budget, a sequence of tokens, and how often."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from pipeline.config import Config
from pipeline.planner.budget import parse_budget
from pipeline.planner.divide import least
from pipeline.planner.resolve import resolve
from storage.errors import ConfigError, UsageError, reason
from storage.shadow import path_of
from storage.store import Store
from storage.tokenizer import load_tokenizer
from workers.lab.bench import children, rows
from workers.lab.bench.children import Ran
from workers.lab.bench.rows import Row
from workers.lab.bench.series import Series

TEXT = Path(__file__).with_name("text.txt")
FEW = 9  # tokens of a row that takes seconds for each


@dataclass(frozen=True, slots=True)
class BenchJob:
    """One store's measurements."""

    store: Store
    budget: str  # of the rows at half memory
    prompt: str
    prompt_tokens: int
    tokens: Path  # file of forced token ids
    count: int  # of them
    repeats: int
    threads: int  # of compute, whatever the settings say; 0: as many as cores
    quick: bool
    say: Callable[[str], None]
    settings: tuple[str, ...] = field(default=())  # of the user, for every ring
    label: str = ""  # before the names of its rows, where several stores are measured

    def beside(self, store: Store, label: str) -> BenchJob:
        """The same tokens and bytes of memory on another store. Raises UsageError for another vocabulary."""
        if store.architecture.vocabulary != self.store.architecture.vocabulary:
            raise UsageError(f"{store.path} is of another vocabulary than {self.store.path}")
        budget = f"{parse_budget(self.budget, self.store)}B"
        return replace(self, store=store, budget=budget, label=f"{label}: ")

    @property
    def context(self) -> int:
        return self.prompt_tokens + self.count

    @property
    def device(self) -> str:
        """`compute.device` of every row."""
        return Config.load(None, self.arguments_of({})).compute.device

    @property
    def dtype(self) -> str:
        """What most weights are stored in."""
        return self.store.layout.unit.codec("up").name

    @property
    def mixture(self) -> bool:
        """Whether routers choose what a token reads."""
        return self.store.architecture.mixture

    @property
    def has_predictors(self) -> bool:
        return self.resolved().predictor.kind == "lowrank"

    @property
    def has_shadow(self) -> bool:
        return path_of(self.store).is_file()

    def resolved(self, settings: Mapping[str, str] | None = None) -> Config:
        """The configuration of a ring with these settings and no budget."""
        return resolve(self.store, Config.load(None, self.arguments_of(settings or {}))).config

    def knows(self, settings: Mapping[str, str]) -> bool:
        """Whether the store's predictors can do what these settings ask for."""
        try:
            self.resolved(settings)
        except ConfigError:
            return False
        return True

    def arguments_of(self, settings: Mapping[str, str]) -> list[str]:
        """`section.key=value`, the given settings last."""
        # After the user's: the baseline and the roofs are measured with the same threads.
        shared = [f"compute.context={self.context}", *self.settings, f"compute.threads={self.threads}"]
        return [*shared, *(f"{key}={value}" for key, value in settings.items())]

    def ring(
        self,
        name: str,
        techniques: tuple[str, ...] = (),
        settings: Mapping[str, str] | None = None,
        budget: str | None = None,
        streams: bool = False,
    ) -> Series:
        """Runs of the main job under a budget.

        A row that `streams` reads most of the model for every token: a few of them tell all.
        """
        settings, memory, name = settings or {}, budget or self.budget, self.label + name
        line = ["--model", str(self.store.path), "--prompt", self.prompt, "--memory", memory]
        line += [f"--set={one}" for one in self.arguments_of(settings)]
        limit = parse_budget(memory, self.store)

        def run() -> Ran:
            with self._tokens(few=streams) as tokens:
                return children.run_main([*line, "--force-tokens", str(tokens)], limit)

        def row(runs: Sequence[Ran]) -> Row:
            return rows.of_rings(name, techniques, runs, self.store.layout.unit, settings)

        return Series(name, run, row, techniques, limit, streams)

    def naive(self) -> Series:
        """Runs of the baseline that keeps nothing; all of its tokens take the same."""
        line = [str(self.store.path), "--position", str(self.prompt_tokens), "--threads", str(self.threads)]
        line += ["--device", self.device]
        limit = parse_budget(self.budget, self.store)

        def run() -> Ran:
            with self._tokens(few=True) as tokens:
                module = "workers.lab.bench.naive"
                return children.run_module(module, [*line, "--tokens", str(tokens)], limit)

        row = partial(rows.of_naive, budget=limit)
        return Series(rows.NAIVE, run, row, budget_bytes=limit, streams=True)

    def _tokens(self, *, few: bool) -> AbstractContextManager[Path]:
        return first_tokens(self.tokens, FEW) if few and not self.quick else nullcontext(self.tokens)


@contextmanager
def first_tokens(tokens: Path, count: int, before: Sequence[int] = ()) -> Iterator[Path]:
    """A file of the first `count` tokens of a file, behind those of `before`."""
    with TemporaryDirectory(prefix="flashring-bench-") as directory:
        path = Path(directory) / "tokens"
        words = [*map(str, before), *tokens.read_text(encoding="utf-8").split()[:count]]
        path.write_text(" ".join(words), encoding="utf-8")
        yield path


@contextmanager
def make_job(
    store: Store,
    *,
    text: Path,
    prompt_tokens: int,
    count: int,
    budget: str,
    repeats: int,
    threads: int,
    quick: bool,
    settings: tuple[str, ...],
    say: Callable[[str], None],
) -> Iterator[BenchJob]:
    """A job over the text's first tokens. Raises UsageError for a text that is too short."""
    tokenizer = load_tokenizer(store)
    try:
        words = text.read_text(encoding="utf-8").split(" ")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"the text {text} cannot be read: {reason(error)}") from error
    at, prompt = 0, ""
    ids: list[int] = []
    while len(ids) < prompt_tokens and at < len(words):
        at += 1
        prompt = " ".join(words[:at])
        ids = tokenizer.encode(prompt).ids
    rest = tokenizer.encode(" " + " ".join(words[at:]), add_special_tokens=False).ids[:count]
    if len(ids) < prompt_tokens or len(rest) < count:
        raise UsageError(f"the text {text} has fewer than {prompt_tokens} + {count} tokens for this model")
    limit = store.architecture.max_positions
    if len(ids) + count > limit:
        raise UsageError(f"{len(ids)} + {count} tokens are beyond the model's context of {limit:,}")
    with TemporaryDirectory(prefix="flashring-bench-") as directory:
        tokens = Path(directory) / "tokens"
        tokens.write_text(" ".join(str(one) for one in rest), encoding="utf-8")
        yield BenchJob(store, budget, prompt, len(ids), tokens, count, repeats, threads, quick, say, settings)


def quick_budget(store: Store, settings: tuple[str, ...], context: int, threads: int) -> str:
    """A budget that leaves a tiny model a quarter of its FFN: half of it would be less than a process."""
    config = Config.load(None, [f"compute.context={context}", *settings, f"compute.threads={threads}"])
    return f"{least(store, config).total + store.layout.total_bytes // 4}B"
