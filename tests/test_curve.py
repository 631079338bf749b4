"""The curve of models without zeros: its arithmetic beside plain numpy, and the dial that is made of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import write_checkpoint

from pipeline import cli
from storage import shadow as shadows
from storage.architecture import Ffn
from storage.codecs import CODECS
from storage.convert import convert
from storage.dial import DIAL, read_dial
from storage.errors import BudgetError, StoreError, UsageError
from storage.store import Store
from storage.tokenizer import load_tokenizer
from workers.lab.evaluation import evaluate
from workers.lab.evaluation.curve import journal as journals
from workers.lab.evaluation.curve import questions
from workers.lab.evaluation.curve.__main__ import run
from workers.lab.evaluation.curve.calibration import Mode, calibrate, centre, centres_of
from workers.lab.evaluation.curve.copies import Copy
from workers.lab.evaluation.curve.journal import Journal, Stage
from workers.lab.evaluation.curve.layer import FfnRows, Inputs, LayerFfn, best
from workers.lab.evaluation.curve.measure import copy_bytes, measure, recall, row_bytes
from workers.lab.evaluation.curve.passes import Passes
from workers.lab.evaluation.curve.points import choose, path
from workers.lab.evaluation.curve.variant import DENSE, Variant, plain
from workers.lab.offline.dense import DenseModel

COPY = "q4"
KINDS = ("llama", "opt-gelu")
F64 = np.float64


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Store]:
    """A gated one in sequence, and a plain one with biases, 64 wide."""
    base = tmp_path_factory.mktemp("curve")
    changes = {"llama": {"intermediate_size": 256}, "opt-gelu": {"ffn_dim": 256}}
    return {
        name: convert(
            write_checkpoint(base / name, name, "float32", changes=changes[name]),
            base / f"{name}-store",
            name=name,
        )
        for name in KINDS
    }


@pytest.fixture(scope="module")
def tokens() -> np.ndarray:
    return np.random.default_rng(3).integers(5, 250, (4, 24))


@pytest.fixture(scope="module", params=KINDS)
def passes(request: pytest.FixtureRequest, stores: dict[str, Store]) -> Passes:
    return Passes(stores[request.param], [COPY], 1)


def one_layer(passes: Passes, count: int = 40) -> tuple[LayerFfn, Inputs, torch.Tensor]:
    """A layer with random inputs, and centres that are not zero."""
    generator = torch.Generator().manual_seed(7)
    own, early, previous = torch.randn(3, count, passes.store.architecture.d_model, generator=generator)
    ffn = passes.layer(1)
    return ffn, Inputs(own, early, previous), 0.1 * torch.randn(ffn.norm.shape, generator=generator)


def naive(ffn: LayerFfn, rows: str, x: np.ndarray) -> np.ndarray:
    """Activations in float64, from the matrices alone."""
    chosen = ffn.rows if rows == "true" else ffn.copies[COPY]
    up = x @ chosen.up.numpy().T.astype(F64)
    up += ffn.up_bias.numpy() if ffn.up_bias.numel() else 0
    if chosen.gate is None:
        return 0.5 * up * (1 + torch.erf(torch.from_numpy(up / np.sqrt(2))).numpy())
    gate = x @ chosen.gate.numpy().T.astype(F64)
    return gate / (1 + np.exp(-gate)) * up


def whole(count: int) -> torch.Tensor:
    found = torch.zeros(count, dtype=torch.bool)
    found[0] = True
    return found


@pytest.mark.parametrize("scored", ["true", "own", "early", "previous"])
@pytest.mark.parametrize("others", ["nothing", "mean", "low"])
@pytest.mark.parametrize("reads", ["all", "down"])
def test_outputs_are_those_of_a_loop(passes: Passes, scored: str, others: str, reads: str) -> None:
    """Neuron by neuron, token by token; the first row has all of them in true rows."""
    ffn, inputs, middle = one_layer(passes, 12)
    share, centred = 0.3, others == "mean"
    variant = Variant("", share, None, scored, centred, others, reads, COPY)  # type: ignore[arg-type]
    output, chosen = ffn.output(variant, 1, inputs, middle, whole(12))
    true, low = (naive(ffn, rows, inputs.own.numpy().astype(F64)) for rows in ("true", "low"))
    source = inputs.of(variant.scored).numpy().astype(F64)
    scored_by = naive(ffn, "true" if scored == "true" else "low", source)
    scores = np.abs(scored_by - (middle.numpy() if centred else 0)) * np.linalg.norm(ffn.rows.down, axis=1)
    for row in range(12):
        best_ones = set(np.argsort(-scores[row])[: round(share * scores.shape[1])])
        expected = np.zeros(output.shape[1]) + (ffn.down_bias.numpy() if ffn.down_bias.numel() else 0)
        for neuron in range(scores.shape[1]):
            if row == 0 or neuron in best_ones:
                a = true if row == 0 or reads == "all" else low
                expected += a[row, neuron] * ffn.rows.down[neuron].numpy()
            elif others == "mean":
                expected += float(middle[neuron]) * ffn.rows.down[neuron].numpy()
            elif others == "low":
                expected += low[row, neuron] * ffn.copies[COPY].down[neuron].numpy()
        assert chosen[row].sum() == (scores.shape[1] if row == 0 else len(best_ones))
        np.testing.assert_allclose(output[row].numpy(), expected, atol=2e-4)


def test_the_centres_bias_is_the_sum_of_skipped_means(passes: Passes) -> None:
    """bias + the chosen ones' distance to their centre, as a ring computes it, is the curve's output."""
    ffn, inputs, middle = one_layer(passes)
    variant = Variant("", 0.2, scored="own", centred=True, others="mean", copy=COPY)
    output, chosen = ffn.output(variant, 1, inputs, middle, whole(40))
    a = ffn.activations(ffn.rows, inputs.own)
    bias = middle @ ffn.rows.down + (ffn.down_bias if ffn.down_bias.numel() else 0)
    torch.testing.assert_close(output, bias + ((a - middle) * chosen) @ ffn.rows.down, atol=1e-4, rtol=1e-4)


def test_all_neurons_are_the_exact_model(passes: Passes, tokens: np.ndarray) -> None:
    """To the bit, whatever the others would have got; and the dense model's logits."""
    every = [
        DENSE,
        Variant("none are low", 1.0, others="low", copy=COPY),
        Variant("none are skipped", 1.0, others="mean", centred=True),
        Variant("above nothing", None, (-np.inf,) * 3, "own", others="low", copy=COPY),
    ]
    with torch.no_grad():
        outputs = passes.run(tokens, every, [torch.ones(256)] * 3)
    for output in outputs[1:]:
        assert torch.equal(output, outputs[0])
    with DenseModel(passes.store, 1) as dense, torch.no_grad():
        expected = dense.forward(tokens)
    torch.testing.assert_close(passes.logits(outputs[0].flatten(0, 1)), expected.flatten(0, 1))


@pytest.mark.parametrize(("bits", "copy"), [(8, "q8"), (4, "q4")])
def test_copies_are_the_rows_of_a_store_of_so_many_bits(
    stores: dict[str, Store], tmp_path: Path, bits: int, copy: str
) -> None:
    """Down rows too, which lie by output there."""
    store = stores["llama"]
    low = convert(store.path.with_name("llama"), tmp_path / "low", name="low", bits=bits)
    assert low.layout.unit.width == 64
    ours = Passes(store, [copy], 1).layer(1).copies[copy]
    theirs = Passes(low, [], 1).layer(1).rows
    for role in ("gate", "up", "down"):
        assert torch.equal(getattr(ours, role), getattr(theirs, role))


def test_values_of_few_bits_are_near_and_of_a_grid() -> None:
    """Eight values a group in three bits, four in two, nearer with more."""
    rows = np.random.default_rng(1).normal(size=(6, 128)).astype(np.float32)
    off = []
    for name, most in (("q2", 4), ("q3g64", 8), ("q3", 8)):
        copy = Copy.of(name)
        found = copy.rounded(rows)
        groups = found.reshape(6, -1, copy.group)
        assert max(np.unique(group).size for row in groups for group in row) <= most
        off.append(float(np.square(found - rows).mean()))
        assert copy.bytes(128) == 128 * copy.bits // 8 + 128 // copy.group * 4
    assert off[0] > off[1] > off[2] > 0
    assert Copy.of("q4").bytes(64) == 40
    with pytest.raises(UsageError, match="unknown low-bit format 'q5'"):
        Copy.of("q5")
    with pytest.raises(UsageError, match="no whole groups of q3g64"):
        Copy.of("q3g64").rounded(rows[:, :96])


def test_down_rows_by_output() -> None:
    """Groups lie along the neurons of a unit, one output after the other."""
    down = np.random.default_rng(1).normal(size=(256, 96)).astype(np.float32)
    found = Copy.of("q4").rounded_down(Ffn("gated", 256, 1, "silu"), down)
    for output in (0, 95):
        column = np.ascontiguousarray(down[64:128, output])[None]
        assert np.array_equal(found[64:128, output], CODECS["q4"].widen(CODECS["q4"].narrow(column))[0])


def test_centres() -> None:
    """Heavy tails move a mean, and not what a neuron gives where it is not chosen; beside a loop."""
    generator = np.random.default_rng(4)
    a = (generator.normal(size=(200, 20)) ** 3 - 0.2).astype(np.float32)
    a[:, 3] = 50 + np.arange(200)  # far from its median nearly always
    norm = generator.uniform(0.5, 2, 20).astype(np.float32)
    empty = torch.zeros(0)
    rows = FfnRows(None, empty, empty)
    ffn = LayerFfn(Ffn("plain", 20, 1, "gelu"), rows, {}, empty, empty, empty, torch.from_numpy(norm))
    found = {kind: centre(ffn, torch.from_numpy(a), kind).numpy() for kind in ("mean", "median", "rest")}
    np.testing.assert_allclose(found["mean"], a.mean(axis=0), rtol=1e-4)
    middle = np.sort(a, axis=0)[99]
    np.testing.assert_allclose(found["median"], middle)
    kept: list[list[float]] = [[] for _ in range(20)]
    for row in a:
        order = np.argsort(-np.abs(row - middle) * norm)
        for neuron in order[6:]:  # of twenty, six are the best 30 %
            kept[neuron].append(float(row[neuron]))
    expected = [np.mean(one) if one else middle[neuron] for neuron, one in enumerate(kept)]
    np.testing.assert_allclose(found["rest"], expected, rtol=1e-4, atol=1e-5)


def test_recall_is_of_weight_and_grows(passes: Passes) -> None:
    """Against sets sorted by numpy, for the oracle itself, and with more neurons."""
    ffn, inputs, _ = one_layer(passes)
    weights = ffn.scores(ffn.activations(ffn.rows, inputs.own), None)
    low = ffn.scores(ffn.activations(ffn.copies[COPY], inputs.previous), None)
    assert recall(ffn, inputs.own, best(weights, 0.2)) == pytest.approx(1.0)
    captured = []
    for share in (0.1, 0.3, 0.6, 1.0):
        chosen = best(low, share)
        ratios = []
        for row in range(0, 40, 8):
            one, count = weights[row].numpy(), int(chosen[row].sum())
            ratios.append(one[chosen[row].numpy()].sum() / np.sort(one)[::-1][:count].sum())
        assert recall(ffn, inputs.own, chosen) == pytest.approx(np.mean(ratios), rel=1e-5)
        captured.append(float((weights * chosen).sum()))
    assert captured == sorted(captured)
    assert recall(ffn, inputs.own, best(low, 1.0)) == pytest.approx(1.0)


def test_measures_are_those_of_the_logits(passes: Passes, tokens: np.ndarray) -> None:
    """Perplexity, divergence, agreement and shares, from logits in float64."""
    half = Variant("half", 0.5, scored="own", others="low", copy=COPY)
    found = measure(passes, tokens, [half, plain(COPY)], None, 0)
    with torch.no_grad():
        outputs = passes.run(tokens[:, :-1], [DENSE, half])
        logs = [torch.log_softmax(passes.logits(one.flatten(0, 1)).double(), -1).numpy() for one in outputs]
    then = tokens[:, 1:].reshape(-1)
    for one, log in zip(found, logs, strict=False):
        nats = -log[np.arange(then.size), then].mean()
        apart = (np.exp(logs[0]) * (logs[0] - log)).sum(1)
        assert one.perplexity == pytest.approx(np.exp(nats), rel=1e-5)
        assert one.divergence_mean == pytest.approx(apart.mean(), rel=1e-2, abs=1e-6)
        assert one.divergence_p99 == pytest.approx(np.quantile(apart, 0.99), rel=1e-2, abs=1e-6)
        assert one.agreement.value == pytest.approx((log.argmax(1) == logs[0].argmax(1)).mean())
    exact, chosen, none = found
    store, rows = passes.store, len(passes.store.layout.unit.rows)
    every = sum(row_bytes(store, layer, DENSE) for layer in range(3))
    assert every == 3 * 256 * rows * 64 * 4
    assert (exact.share, exact.bytes_per_token, exact.memory, exact.divergence_mean) == (1, every, 0, 0)
    assert (chosen.share, chosen.bytes_per_token) == (0.5, every / 2)
    assert (none.share, none.bytes_per_token) == (0, 0)
    assert chosen.memory == none.memory == 3 * 256 * rows * 40
    skipped = Variant("", 0.5, scored="own", centred=True, others="mean", copy=COPY)
    assert copy_bytes(store, skipped) == 3 * 256 * (rows - 1) * 40


def test_thresholds_choose_the_share_they_were_learned_for(passes: Passes, tokens: np.ndarray) -> None:
    """On the text itself; errors fall with the share, to nothing where all rows are true."""
    shares = (0.0, 0.1, 0.5, 1.0)
    modes = (Mode(COPY), Mode(COPY, "low", "down"), Mode(COPY, "mean"))
    middle = centres_of(passes, tokens)
    known = calibrate(passes, tokens, shares, modes, middle)
    for mode in modes:
        table = known.tables[mode]
        assert (np.diff(table.errors[:, :3], axis=1) < 0).all()
        assert (
            (table.errors[:, -1] > 1e-6).all() if mode.reads == "down" else (table.errors[:, -1] == 0).all()
        )
        assert (table.thresholds[:, 0] == np.inf).all()
        assert (table.thresholds[:, -1] == -np.inf).all()
    found: dict[str, list[float]] = {}

    def see(index: int, variant: Variant, ffn: LayerFfn, inputs: Inputs, chosen: torch.Tensor) -> None:
        table = known.tables[modes[0]]
        scores = ffn.scores(ffn.activations(ffn.copies[COPY], inputs.own), None)
        guessed = ffn.scores(ffn.activations(ffn.copies[COPY], inputs.early), None)
        found.setdefault("own", []).append(float((scores > table.thresholds[index, 2]).float().mean()))
        found.setdefault("early", []).append(float((guessed > table.guesses[index, 2]).float().mean()))

    with torch.no_grad():
        passes.run(tokens, [DENSE], see=see)
    assert np.allclose(found["own"], 0.5, atol=0.001)
    assert np.allclose(found["early"], 0.5, atol=0.001)
    for index in range(3):
        expected = middle[index] @ passes.layer(index).rows.down
        torch.testing.assert_close(known.biases[index], expected)


def test_a_layer_by_itself_begins_with_the_exact_stream(passes: Passes, tokens: np.ndarray) -> None:
    """All others are exact, before it and behind it."""
    low = [Variant(f"{only}", 0.0, others="low", copy=COPY, only=only) for only in (0, 2)]
    seen: dict[str, list[int]] = {}

    def see(index: int, variant: Variant, ffn: LayerFfn, inputs: Inputs, chosen: torch.Tensor) -> None:
        seen.setdefault(variant.name, []).append(int(chosen[1].sum()))

    with torch.no_grad():
        exact, *others = passes.run(tokens, [DENSE, *low], see=see)
    assert seen == {"exact": [256] * 3, "0": [0, 256, 256], "2": [0]}
    assert all(not torch.equal(exact, one) for one in others)


class Stopped(Exception):
    pass


def test_a_stopped_measurement_goes_on_at_its_layer(
    passes: Passes, tokens: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the same figures; of other tokens, or with other thresholds, it begins anew."""
    monkeypatch.setattr(journals, "EVERY", 0.0)
    journal, half = Journal(tmp_path / "partial"), Variant("half", 0.5, scored="own", others="low", copy=COPY)
    expected, load, loaded = measure(passes, tokens, [half], None, 0), passes.layer, list[int]()

    def stopping(index: int) -> LayerFfn:
        if index == 2:
            raise Stopped
        return load(index)

    monkeypatch.setattr(passes, "layer", stopping)
    with pytest.raises(Stopped):
        measure(passes, tokens, [half], None, 0, stage=journal.stage("settings"))

    def watched(index: int) -> LayerFfn:
        loaded.append(index)
        return load(index)

    monkeypatch.setattr(passes, "layer", watched)
    assert measure(passes, tokens, [half], None, 0, stage=journal.stage("settings")) == expected
    assert loaded == [2]
    assert measure(passes, tokens, [half], None, 0, stage=journal.stage("settings")) == expected
    assert loaded == [2]  # it had ended
    measure(passes, tokens[:2], [half], None, 0, stage=journal.stage("settings"))
    assert loaded == [2, 0, 1, 2]
    journal.close()
    assert not (tmp_path / "partial").exists()


def test_a_budget_for_one_layer_is_enough(passes: Passes) -> None:
    store = passes.store
    with pytest.raises(BudgetError, match=r"measuring .* takes .* and the budget is 1.00 GiB"):
        Passes(store, [COPY], 1, 1 << 30)
    small = Passes(
        store, [COPY], 1, (3 << 29) + store.manifest.files["resident.safetensors"].bytes + (600 << 10)
    )
    assert small.layer(0) is not small.layer(0)
    assert passes.layer(0) is passes.layer(0)


def test_a_shadows_rows_are_the_copys(stores: dict[str, Store], tmp_path: Path) -> None:
    """What a ring computes with is what is measured, without rounding again."""
    for name, store in stores.items():
        other = convert(store.path.with_name(name), tmp_path / name, name=name)
        rounded = Passes(other, [COPY], 1).layer(1).copies[COPY]
        shadows.write(other, 4)
        read = Passes(other, [COPY], 1).layer(1).copies[COPY]
        assert torch.equal(read.up, rounded.up)
        assert torch.equal(read.down, rounded.down)
        assert (read.gate is None) == (rounded.gate is None)


def test_the_greedy_path() -> None:
    """Most loss saved a byte first; a place that brings little alone is passed over."""
    losses = np.array([[8.0, 4.0, 0.0], [9.0, 8.9, 0.0]])
    sizes = np.array([[0.0, 1.0, 2.0], [0.0, 1.0, 2.0]])
    assert list(path(losses, sizes)) == [(0, 0), (0, 2), (1, 2), (2, 2)]


def test_points_within_their_budgets(passes: Passes, tokens: np.ndarray) -> None:
    """The fewest bytes within each, by perplexity and by divergence; none where nothing keeps it."""
    shares = (0.0, 0.2, 0.6, 1.0)
    variants = [Variant("", share, others="low", copy=COPY) for share in shares]
    found = measure(passes, tokens, variants, None, 0)[1:]
    settings = [Mode(COPY).variant("", [share]) for share in shares]
    losses = [max(one.ratio.value - 1, one.divergence_mean) for one in found]
    assert losses[0] > losses[3] == 0
    named = choose(found, settings, {"loose": losses[0], "none": 0.0, "never": -1.0})  # type: ignore[arg-type]
    assert named == {"loose": settings[0], "none": settings[3], "small": settings[0]}


def test_a_dial_is_decided_and_kept(
    stores: dict[str, Store], tmp_path: Path, here: Callable[..., object], text: Path
) -> None:
    """By the command, into the store; a ring reads what was measured."""
    store = convert(stores["llama"].path.with_name("llama"), tmp_path / "store", name="small")
    options = (
        "--model",
        store.path,
        "--text",
        text,
        "--tokens",
        "256",
        "--held-out",
        "256",
        "--length",
        "64",
    )
    done = here(cli.main, "calibrate", *options, "--test", text, "--test-tokens", "128", "--json")
    assert done.returncode == 0, done.stderr  # type: ignore[attr-defined]
    report = json.loads(done.stdout)  # type: ignore[attr-defined]
    found = read_dial(store)
    assert found is not None
    assert [one.name for one in found.points] == [one["variant"]["name"] for one in report["points"]]
    assert found.points[-1].name == "small"
    assert (found.points[-1].share, found.points[-1].bytes_per_token) == (0, 0)
    assert found.shadow == dict.fromkeys(("gate", "up", "down"), "q4")
    assert (found.calibration.tokens, found.held_out.tokens) == (256, 256)
    for point, shown in zip(found.points, report["points"], strict=True):
        assert point.perplexity == pytest.approx(shown["ratio"]["value"] - 1)
        assert found.thresholds[point.name].threshold.shape == (3,)
        assert shown["variant"]["thresholds"] == pytest.approx(
            found.thresholds[point.name].threshold.tolist(), rel=1e-6
        )
    losses = [max(one.perplexity, one.divergence_mean) for one in found.points[:-1]]
    assert losses == sorted(losses)
    (store.path / DIAL).write_bytes(
        (store.path / DIAL).read_bytes().replace(b'version\\": 1', b'version\\": 2')
    )
    with pytest.raises(StoreError, match="has version 2"):
        read_dial(store)


def test_another_stores_dial_is_refused(stores: dict[str, Store], tmp_path: Path) -> None:
    store = stores["llama"]
    assert read_dial(store) is None
    (store.path / DIAL).write_bytes(b"no dial")
    with pytest.raises(StoreError, match="damaged"):
        read_dial(store)
    (store.path / DIAL).unlink()


@pytest.fixture
def text(tmp_path: Path) -> Path:
    words = [f"word{number * 7919 % 101} and" for number in range(400)]
    (tmp_path / "text.txt").write_text(" ".join(words))
    return tmp_path / "text.txt"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--shares", "2"), "--shares takes numbers between 0 and 1"),
        (("--shares", "x"), "--shares takes numbers between 0 and 1"),
        (("--copies", "q9"), "unknown low-bit format 'q9'"),
        (("--centres", "mode"), "--centres is one of mean, median, rest"),
    ],
)
def test_options_that_make_no_sense(
    text: Path,
    options: tuple[str, ...],
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("sys.argv", ["curve", "--text", str(text), "--calibration", str(text), *options])
    assert run() == UsageError.exit_code
    assert words in capsys.readouterr().err


def test_the_curve_by_the_command(stores: dict[str, Store], text: Path, here: Callable[..., object]) -> None:
    """Every share by every choice; what is read falls with the share."""
    options = ("--oracle-curve", "--text", text, "--calibration", text, "--tokens", "512", "--json")
    done = here(cli.main, "evaluate", "--model", stores["llama"].path, *options)
    assert done.returncode == 0, done.stderr  # type: ignore[attr-defined]
    rows = json.loads(done.stdout)["rows"]  # type: ignore[attr-defined]
    names = [one["variant"]["name"] for one in rows]
    assert names[:3] == ["exact", "oracle 50%, skip", "oracle 50%, mean"]
    assert len(set(names)) == len(rows) == 1 + 2 * 5 + 2 * (1 + 7 * 5)
    assert all(0 < one["recall"] <= 1.000001 for one in rows)


def test_questions_are_answered_as_the_evaluation_does(
    passes: Passes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The exact model's answers are the dense one's; all neurons change none, and low bits every score."""
    choices = [[f"{number * 37 % 11} {one}" for one in ("cat", "a bird", "tree")] for number in range(9)]
    items = [{"query": f"word {n * 7}", "choices": one, "gold": n % 3} for n, one in enumerate(choices)]
    (tmp_path / "arc_easy.jsonl").write_text("\n".join(map(json.dumps, items)))
    monkeypatch.setattr(questions, "_TOGETHER", 4)  # three rounds
    tokenizer = load_tokenizer(passes.store)
    every = [Variant("all", 1.0), plain(COPY)]
    found = questions.ask(passes, tokenizer, "arc_easy", tmp_path, 0, every, [torch.zeros(256)] * 3)
    with DenseModel(passes.store, 1) as dense, torch.no_grad():
        expected = evaluate.evaluate_task(
            dense, None, tokenizer, "arc_easy", tmp_path, None, lambda stage, done, total: None
        )
        pairs = [([5, 9, 11], [7, 30]), ([5, 9, 11, 6], [8])]
        scores = evaluate.continuations(dense, None, pairs)
    assert [one.dense for one in found] == [expected.dense] * 2
    assert found[0] == expected
    exact, low = questions.continuations(passes, pairs, [DENSE, plain(COPY)], [torch.zeros(256)] * 3)
    for one, other, dense_one in zip(exact, low, scores, strict=True):
        assert one == (pytest.approx(dense_one[0], abs=1e-4), dense_one[1])
        assert abs(other[0] - one[0]) > 0


def test_what_choices_share_changes_no_answer(passes: Passes) -> None:
    """Beside every pair by itself; a choice that another begins with, and one question twice."""
    contexts = ([5, 9, 11], [5, 9, 12, 40, 41], [5, 9, 11])
    pairs = [(one, two) for one in contexts for two in ([7, 30], [7], [7, 30, 31, 8], [60, 61])]
    whole = Variant("some", thresholds=(0.02,) * 3, scored="own", others="low", copy=COPY)
    variants = [DENSE, plain(COPY), whole]
    centres = [torch.zeros(256)] * 3
    together = questions.continuations(passes, pairs, variants, centres)
    for number, pair in enumerate(pairs):
        alone = questions.continuations(passes, [pair], variants, centres)
        for many, (one,) in zip(together, alone, strict=True):
            assert many[number] == (pytest.approx(one[0], abs=1e-5), one[1])


def test_the_first_with_the_same_text() -> None:
    tokens = np.array([[5, 6, 7, 0], [5, 6, 7, 8], [5, 7, 7, 8], [6, 6, 0, 0]])
    found = questions.first_alike(tokens, [3, 4, 4, 2])
    assert found.view(4, 4).tolist() == [[0, 1, 2, 0], [0, 1, 2, 7], [0, 9, 10, 11], [12, 13, 0, 0]]


def test_stopped_questions_go_on(passes: Passes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    items = [{"query": f"word {n}", "choices": ["cat", "a dog"], "gold": n % 2} for n in range(6)]
    (tmp_path / "arc_easy.jsonl").write_text("\n".join(map(json.dumps, items)))
    monkeypatch.setattr(questions, "_TOGETHER", 2)
    monkeypatch.setattr(journals, "EVERY", 0.0)
    tokenizer, every = load_tokenizer(passes.store), [plain(COPY)]

    def asked(stage: Stage | None) -> object:
        centres = [torch.zeros(256)] * 3
        return questions.ask(passes, tokenizer, "arc_easy", tmp_path, 0, every, centres, stage=stage)

    expected, real, rounds = asked(None), questions.continuations, list[int]()

    def stopping(*given: object) -> object:
        rounds.append(1)
        if len(rounds) == 2:
            raise KeyboardInterrupt
        return real(*given)  # type: ignore[arg-type]

    monkeypatch.setattr(questions, "continuations", stopping)
    journal = Journal(tmp_path / "partial")
    with pytest.raises(KeyboardInterrupt):
        asked(journal.stage("arc_easy"))
    assert asked(journal.stage("arc_easy")) == expected
    assert len(rounds) == 4  # the first round of three is not computed again
