"""The layer loop over real sockets, with one thread that plays predictor, cache and prefetcher."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import write_checkpoint
from decoding import LocalDecoder
from tokenizers.pre_tokenizers import ByteLevel

from pipeline.ring import segments
from pipeline.ring.channel import Channel
from pipeline.ring.messages import (
    EMBEDDING,
    Cancel,
    Finished,
    Generate,
    HiddenReady,
    LayerPart,
    Message,
    NeuronsPredicted,
    PartDone,
    TokenReady,
)
from pipeline.ring.plan import Forecast, Kind, Plan
from pipeline.ring.segments import ID, SLOT
from storage.convert import convert
from storage.store import Store
from workers.compute.constraint import Constraints, Unfollowable
from workers.compute.cpu.device import CpuDevice
from workers.compute.device import Device
from workers.compute.drafts.source import Source
from workers.compute.engine import Engine
from workers.compute.torch.device import TorchDevice
from workers.compute.weights import Weights
from workers.lab.offline.dense import DenseModel
from workers.predictor.targets import targets_of_choice

PROMPT = (2, 17, 40, 9, 77, 31)


@dataclass
class FakeRing:
    """Answers every announcement with the whole layer, cut into parts as told.

    `cuts` are the ids at which a layer's neurons are divided into parts; `interleaved` gives the
    parts neurons in turn instead; `staged` makes every part close a group.
    """

    store: Store
    plan: Plan
    memory: segments.Segments
    channel: Channel
    cuts: tuple[int, ...] = ()
    interleaved: int = 0
    staged: bool = False
    shuffle: int = 0
    late_schedule: bool = False
    announced: list[HiddenReady] = field(default_factory=list)
    sources: list[np.ndarray] = field(default_factory=list)
    credits: list[PartDone] = field(default_factory=list)
    results: list[Message] = field(default_factory=list)
    cancel_at: tuple[int, int] | None = None  # (step, layer) whose announcement triggers a cancel
    engine: Engine | None = None
    sent: set[tuple[int, int]] = field(default_factory=set)  # steps and layers

    def fill(self) -> None:
        """Put every bundle into a slot, permuted by `shuffle`."""
        for layer in range(self.plan.layers):
            self.memory.bundles[self.slots(layer)] = self.store.read_layer(layer)

    def slots(self, layer: int) -> np.ndarray:
        """The slot of every neuron."""
        order = np.random.default_rng(self.shuffle).permutation(self.plan.units[layer])
        return (self.plan.first_slot(layer) + order).astype(np.int32)

    def parts(self) -> list[np.ndarray]:
        """Ids of every part."""
        ids = np.arange(self.plan.most_units, dtype=np.int32)
        if self.interleaved:
            return [ids[start :: self.interleaved] for start in range(self.interleaved)]
        return np.split(ids, self.cuts)

    def serve(self, ended: threading.Event) -> None:
        while not ended.is_set():
            for inbox in ("predictor", "cache", "supervisor"):
                message = self.channel.receive(inbox, 0.001)
                if isinstance(message, HiddenReady):
                    self.answer(message)
                elif isinstance(message, PartDone):
                    self.credits.append(message)
                elif message is not None:
                    self.results.append(message)

    def answer(self, message: HiddenReady) -> None:
        self.announced.append(message)
        self.sources.append(self.memory.hidden[message.layer + 1, : message.rows].copy())
        if self.cancel_at == (message.step.number, message.layer):
            assert self.engine is not None
            self.engine.cancel(Cancel(message.run))
        for layer in self.due(message):
            if layer < self.plan.layers:
                self.sent.add((message.step.number, layer))
                self.send(message, layer)

    def due(self, message: HiddenReady) -> Sequence[int]:
        """The layers to send."""
        forecast, at = self.plan.forecast, (message.step.number, message.layer)
        if message.step.every and forecast.routed and not self.plan.whole:
            asked = at in self.sent
            found = targets_of_choice(self.plan, message.layer, len(message.chosen), asked)
            return [target.layer for target in found]
        ahead = max(1, forecast.lookahead) if message.step.every else forecast.lookahead
        return range(ahead) if message.layer == EMBEDDING else [message.layer + ahead]

    def send(self, message: HiddenReady, layer: int) -> None:
        parts = self.parts()
        table = self.memory.wanted[layer]
        ids = np.concatenate(parts)
        table[ID, : ids.size], table[SLOT, : ids.size] = ids, self.slots(layer)[ids]
        counts = tuple(part.size for part in parts)
        last = len(parts) - 1
        closes = tuple(self.staged or number == last for number in range(len(parts)))
        run, step = message.run, message.step.number
        schedule = LayerPart(run, step, layer, 0, counts, closes, self.staged)
        rest = [LayerPart(run, step, layer, number, (), (), False) for number in range(1, len(parts))]
        for one in [*rest, schedule] if self.late_schedule else [schedule, *rest]:
            self.channel.send("compute", one)

    @property
    def tokens(self) -> list[int]:
        return [message.token for message in self.results if isinstance(message, TokenReady)]

    @property
    def logprobs(self) -> list[float]:
        return [message.logprob for message in self.results if isinstance(message, TokenReady)]


@contextmanager
def ring(
    store: Store,
    directory: Path,
    lookahead: int = 1,
    kind: Kind = "lowrank",
    threads: int = 1,
    on: Callable[[Weights, int, int], Device[Any]] = CpuDevice,
    constraints: Any = None,
    spare: int = 0,
    drafts: Source | None = None,
    **how: object,
) -> Iterator[FakeRing]:
    layout = store.layout
    plan = Plan(
        d_model=store.architecture.d_model,
        units=layout.units,
        stride=layout.stride,
        slots=tuple(units + spare for units in layout.units),
        staging=8,
        context=64,
        hidden_rows=4,
        forecast=Forecast(kind, lookahead, refine=False),
        drafts=0 if drafts is None else 4,
    )
    views = {name: np.zeros(shape, kind) for name, (shape, kind) in segments._shapes(plan).items()}
    memory = segments.Segments(**views)
    ended = threading.Event()
    directory.mkdir(exist_ok=True)
    with (
        Channel(directory, ("compute",)) as mine,
        Channel(directory, ("predictor", "cache", "supervisor")) as theirs,
    ):
        fake = FakeRing(store, plan, memory, theirs, **how)  # type: ignore[arg-type]
        fake.fill()
        device = on(Weights(store), plan.context, threads)
        fake.engine = Engine(
            store.architecture, device, plan, memory, mine, constraints=constraints, drafts=drafts
        )
        server = threading.Thread(target=fake.serve, args=(ended,))
        server.start()
        try:
            yield fake
        finally:
            ended.set()
            server.join()
            fake.engine.close()


def generate(
    fake: FakeRing, run: int = 1, count: int = 8, prompt: Sequence[int] = PROMPT, **changes: object
) -> Finished:
    """Run one generation to its `Finished`."""
    values: dict[str, object] = {
        "max_new_tokens": count,
        "temperature": 0.0,
        "top_k": 0,
        "top_p": 1.0,
        "seed": 0,
        "stop_tokens": (),
        "forced": (),
        **changes,
    }
    fake.results.clear()
    assert fake.engine is not None
    fake.engine.generate(Generate(run=run, prompt=tuple(prompt), **values))  # type: ignore[arg-type]
    while not (fake.results and isinstance(fake.results[-1], Finished)):
        threading.Event().wait(0.001)
    return fake.results[-1]


@pytest.fixture(scope="module", params=["opt", "falcon-relu", "falcon-rw"])
def store(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Store:
    base = tmp_path_factory.mktemp(request.param)
    checkpoint = write_checkpoint(base / "checkpoint", request.param, "float16")
    return convert(checkpoint, base / "store", name="small")


@pytest.fixture(scope="module")
def opt(tmp_path_factory: pytest.TempPathFactory) -> Store:
    base = tmp_path_factory.mktemp("engine")
    return convert(write_checkpoint(base / "checkpoint", "opt", "bfloat16"), base / "store", name="small")


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Eight experts, three a token, in every layer."""
    base = tmp_path_factory.mktemp("engine")
    return convert(write_checkpoint(base / "checkpoint", "qwen3-moe", "bfloat16"), base / "store", name="m")


def test_the_ring_runs_on_torch_as_on_the_kernels(store: Store, tmp_path: Path) -> None:
    def on(weights: Weights, context: int, threads: int) -> TorchDevice:
        return TorchDevice(weights, context)

    with ring(store, tmp_path / "ring", on=on, cuts=(16, 40)) as fake:
        generate(fake, count=12)
        assert fake.tokens == _locally(store, 12)


def _locally(store: Store, count: int) -> list[int]:
    with LocalDecoder(store) as decoder:
        logits = decoder.prefill(PROMPT)[-1]
        tokens = []
        for _ in range(count):
            tokens.append(int(np.argmax(logits)))
            logits = decoder.step(tokens[-1])
    return tokens


def test_the_loop_writes_what_the_decoder_does(store, tmp_path):
    with ring(store, tmp_path) as fake:
        assert generate(fake).reason == "length"
        assert fake.tokens == _locally(store, 8)
        assert [message.index for message in fake.results[:-1]] == list(range(8))  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "how",
    [
        {"cuts": (0, 1, 100)},
        {"interleaved": 3},
        {"interleaved": 3, "late_schedule": True},
        {"cuts": (50, 150), "staged": True},
        {"cuts": tuple(range(0, 190, 7)), "staged": True, "late_schedule": True},
        {"shuffle": 5},
        {"lookahead": 0},
        {"lookahead": 2},
        {"threads": 2},
    ],
    ids=str,
)
def test_neither_parts_nor_slots_change_a_bit(opt, tmp_path, how):
    with ring(opt, tmp_path / "a") as fake:
        generate(fake)
        expected = fake.tokens, fake.logprobs
    with ring(opt, tmp_path / "b", **how) as fake:
        generate(fake)
        assert (fake.tokens, fake.logprobs) == expected


def test_a_ring_that_holds_everything_asks_once(store, tmp_path):
    """Later steps, and later runs with their prefills, find the units where the first has seen them."""
    with ring(store, tmp_path / "a") as fake:
        generate(fake)
        expected = fake.tokens, fake.logprobs
    with ring(store, tmp_path / "b", kind="all", shuffle=3) as fake:
        generate(fake)
        assert (fake.tokens, fake.logprobs) == expected
        assert {one.step.number for one in fake.announced} == {0}
        fake.results.clear()
        generate(fake)
        assert (fake.tokens, fake.logprobs) == expected
        assert {one.step.number for one in fake.announced} == {0}
        assert fake.engine is not None
        steps = 2 * (len(fake.tokens) - 1)
        assert fake.engine.counts["kept"] == steps * sum(fake.plan.units)


def test_announcements_follow_the_protocol(store, tmp_path):
    with ring(store, tmp_path) as fake:
        generate(fake, count=3)
    layers = fake.plan.layers
    assert [(one.step.number, one.layer) for one in fake.announced] == [
        (step, layer) for step in range(3) for layer in range(-1, layers)
    ]
    assert [one.step.every for one in fake.announced] == [True] * (layers + 1) + [False] * 2 * (layers + 1)
    assert {one.rows for one in fake.announced if one.step.every} == {4}
    assert {one.rows for one in fake.announced if not one.step.every} == {1}
    embedded = []
    for one, hidden in zip(fake.announced, fake.sources, strict=True):
        tick = one.step.number * layers + one.layer
        # Everything before this layer is finished; the embedding comes after the last step's end.
        assert one.done == (one.step.number * layers - 1 if one.layer == EMBEDDING else tick - 1)
        if one.layer == EMBEDDING:
            embedded.append(hidden)
    with DenseModel(store, 1) as model:
        wanted = model.embed([[*PROMPT, *fake.tokens[:2]]])[0].numpy()
    assert np.allclose(np.concatenate(embedded), wanted[-6:], atol=1e-6)  # of the prompt the last four


def test_the_ffn_input_is_announced_before_the_layers_own_parts(opt, tmp_path):
    # At look-ahead 0 a layer's parts are sent only in answer to its own announcement.
    with ring(opt, tmp_path, lookahead=0) as fake:
        assert generate(fake, count=2).reason == "length"


def _await_credits(fake: FakeRing, count: int) -> None:
    """They travel on another socket than `Finished`; the test's time limit bounds the wait."""
    while len(fake.credits) < count:
        threading.Event().wait(0.001)


def test_staged_parts_are_answered_once_each(opt, tmp_path):
    with ring(opt, tmp_path, cuts=(64, 128), staged=True) as fake:
        generate(fake, count=2)
        layers = fake.plan.layers
        _await_credits(fake, 2 * layers * 3)
    assert [(one.step, one.layer, one.part) for one in fake.credits] == [
        (step, layer, part) for step in range(2) for layer in range(layers) for part in range(3)
    ]


def test_steps_and_done_go_on_over_runs(opt, tmp_path):
    with ring(opt, tmp_path) as fake:
        generate(fake, run=1, count=2)
        first = fake.tokens
        seen = len(fake.announced)
        generate(fake, run=2, count=2)
        assert fake.tokens == first
    opening = fake.announced[seen]
    assert (opening.run, opening.step.number, opening.done) == (2, 2, 2 * fake.plan.layers - 1)
    assert opening.step.every


def test_a_prompt_of_one_token_is_a_prefill(opt, tmp_path):
    with ring(opt, tmp_path) as fake:
        generate(fake, prompt=(5,), count=1)
    assert all(one.step.every for one in fake.announced)
    assert len(fake.tokens) == 1


def test_a_stop_token_ends_the_run_and_is_not_reported(opt, tmp_path):
    with ring(opt, tmp_path) as fake:
        generate(fake)
        whole = fake.tokens
        stop = whole[3]
        assert generate(fake, run=2, stop_tokens=(stop,)).reason == "stop"
        assert fake.tokens == whole[: whole.index(stop)]


def test_forced_tokens_are_emitted_and_fed(opt, tmp_path):
    forced = (9, 2, 30, 31)
    with ring(opt, tmp_path) as fake:
        generate(fake, count=6, forced=forced, stop_tokens=(2,))
        assert tuple(fake.tokens[:4]) == forced
        after, scores = fake.tokens[4], fake.logprobs[:4]
    with LocalDecoder(opt) as decoder:
        logits = decoder.prefill(PROMPT)[-1].astype(np.float64)
        for token, score in zip(forced, scores, strict=True):
            assert score == pytest.approx(logits[token] - np.log(np.exp(logits).sum()), abs=1e-5)
            logits = decoder.step(token).astype(np.float64)
        assert after == int(np.argmax(logits))


def test_the_context_is_never_exceeded(opt, tmp_path):
    with ring(opt, tmp_path) as fake:
        prompt = [5 + index for index in range(60)]
        assert generate(fake, prompt=prompt, count=50).reason == "length"
        # The last token is reported but never fed: 60 + 4 positions hold 5 new tokens.
        assert len(fake.tokens) == 5
        assert generate(fake, run=2, prompt=prompt + prompt, count=5).reason == "length"
        assert fake.tokens == []


@pytest.mark.parametrize("lookahead", [0, 1, 2])
def test_cancel_in_prefill_drains_what_was_announced(opt, tmp_path, lookahead):
    how = {"cuts": (64, 128), "staged": True}
    with ring(opt, tmp_path, lookahead=lookahead, cancel_at=(0, 0), **how) as fake:
        assert generate(fake).reason == "cancelled"
        assert fake.tokens == []
        fake.cancel_at = None
        assert fake.engine is not None
        drained = min(fake.plan.layers, 1 + max(1, lookahead))
        _await_credits(fake, 3 * drained)
        assert {one.layer for one in fake.credits} == set(range(drained))
        assert generate(fake, run=2).reason == "length"
        assert fake.tokens == _locally(opt, 8)


@pytest.mark.parametrize(("prompt", "asked"), [(PROMPT[:2], 1), (tuple(range(2, 40)), 2)])
def test_cancel_in_a_mixtures_prompt_drains_what_was_asked_ahead(
    mixture: Store, tmp_path: Path, prompt: tuple[int, ...], asked: int
) -> None:
    how = {"kind": "router", "spare": 1, "cuts": (3,), "staged": True, "cancel_at": (0, 0)}
    with ring(mixture, tmp_path, **how) as fake:  # type: ignore[arg-type]
        assert generate(fake, prompt=prompt).reason == "cancelled"
        _await_credits(fake, 2 * asked)
        assert {one.layer for one in fake.credits} == set(range(asked))
        fake.cancel_at = None
        assert generate(fake, run=2).reason == "length"
        assert fake.tokens == _locally(mixture, 8)


def test_a_mixture_announces_its_choice(mixture: Store, tmp_path: Path) -> None:
    with ring(mixture, tmp_path, kind="router", spare=1) as fake:
        generate(fake, count=2)
        layers = fake.plan.layers
    assert len(fake.announced) == (1 + layers) + layers, (
        "behind a token's last layer there is nothing to guess"
    )
    sets = [one for one in fake.results if isinstance(one, NeuronsPredicted)]
    assert [(one.layer, one.certain, one.guess) for one in sets] == [
        (layer, 3, False) for layer in range(layers)
    ]
    for one in fake.announced:
        assert bool(one.chosen) == (one.layer != EMBEDDING)
        assert 3 * bool(one.chosen) <= one.kept <= len(one.chosen), "three a token"
        assert list(one.chosen[: one.kept]) == sorted(one.chosen[: one.kept])


def test_cancel_in_decode_ends_at_a_token(opt, tmp_path):
    with ring(opt, tmp_path, cancel_at=(2, 1)) as fake:
        assert generate(fake).reason == "cancelled"
        assert fake.tokens == _locally(opt, 8)[: len(fake.tokens)]
        assert 1 <= len(fake.tokens) < 8
        fake.cancel_at = None
        generate(fake, run=2)
        assert fake.tokens == _locally(opt, 8)


def test_a_cancel_for_another_run_is_ignored(opt, tmp_path):
    with ring(opt, tmp_path) as fake:
        assert fake.engine is not None
        fake.engine.cancel(Cancel(7))
        assert generate(fake).reason == "length"
        assert len(fake.tokens) == 8
        assert generate(fake, run=7).reason == "cancelled"


@pytest.fixture
def end_token(store: Store) -> int:
    return store.architecture.eos_tokens[0]


def test_a_grammar_is_kept_and_ends_the_run_where_nothing_can_follow(
    store: Store, tmp_path: Path, end_token: int
) -> None:
    form = {"grammar": 'start: "maybe" | "never"', "stop_tokens": (end_token,)}
    letters = {token: number for number, token in enumerate(sorted(ByteLevel.alphabet()), 4)}
    words = [[letters[letter] for letter in word] for word in ("maybe", "never")]
    with ring(store, tmp_path / "r", constraints=Constraints(store)) as fake:
        assert generate(fake, run=1, count=20, **form).reason == "stop"
        assert fake.tokens in words
        assert generate(fake, run=2, count=3, **form).reason == "length"
        assert fake.tokens in [word[:3] for word in words]
        sampled = {}
        for run in range(3, 12):
            generate(fake, run=run, count=20, temperature=5.0, seed=run % 8, **form)
            assert fake.tokens in words
            assert sampled.setdefault(run % 8, fake.tokens) == fake.tokens, "one seed, one text"
        assert fake.engine is not None
        assert fake.engine.counts["masks"] == 5 + 3 + 9 * 5
        free = generate(fake, run=20, count=4)
        assert (free.reason, fake.engine.counts["masks"]) == ("length", 53)


def test_a_grammar_that_cannot_be_followed_ends_its_run_alone(store: Store, tmp_path: Path) -> None:
    class Failing:
        def of(self, grammar: str, end_tokens: Sequence[int]) -> Any:
            return self

        def allowed(self) -> Any:
            raise Unfollowable("it is too much")

    with ring(store, tmp_path / "r", constraints=Failing()) as fake:
        finished = generate(fake, grammar="any")
        assert (finished.reason, finished.error, fake.tokens) == ("failed", "it is too much", [])
        assert generate(fake, run=2, count=4).reason == "length"
