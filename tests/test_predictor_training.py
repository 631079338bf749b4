"""Predictor training: metrics, the training-free start, learning, resuming, refusing."""

from __future__ import annotations

import json
import lzma
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import checkpoints
import numpy as np
import pytest
import torch
from ring import config
from safetensors import safe_open

from pipeline.planner.divide import plan
from pipeline.ring.plan import Forecast
from storage.convert import convert
from storage.errors import StoreError, UnsupportedModel, UsageError
from storage.lock import locked
from storage.manifest import PREDICTORS
from storage.store import Store
from storage.tensors import Tensors
from workers.lab.offline.chooser import make_chooser
from workers.lab.offline.dense import DenseModel
from workers.lab.offline.forward import forward
from workers.lab.training import __main__ as training
from workers.lab.training import activations, fit, lowmap, report, svd, texts
from workers.lab.training.__main__ import make
from workers.lab.training.activations import Samples
from workers.lab.training.job import Split, TrainingJob
from workers.predictor import lowrank

ROOT = Path(__file__).resolve().parent.parent

CPU = torch.device("cpu")


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    where = tmp_path_factory.mktemp("trained")
    return convert(checkpoints.write_checkpoint(where / "checkpoint", "opt"), where / "store", name="tiny")


@pytest.fixture
def tokens(store: Store) -> np.ndarray:
    generator = np.random.default_rng(3)
    return generator.integers(4, 200, (24, min(32, store.architecture.max_positions)))


def planted(rank: int, rows: int = 4096, d_model: int = 32, d_ff: int = 128) -> tuple[Samples, torch.Tensor]:
    """Inputs, and neurons that fire by a map of this rank, about one in ten; and the map's matrix."""
    generator = np.random.default_rng(1)
    inputs = generator.standard_normal((rows, d_model)).astype(np.float16)
    matrix = generator.standard_normal((d_ff, rank)) @ generator.standard_normal((rank, d_model))
    matrix /= np.linalg.norm(matrix, axis=1, keepdims=True)
    active = inputs.astype(np.float64) @ matrix.T > 1.28
    packed = np.packbits(active, axis=1, bitorder="little")
    return Samples(inputs, packed, d_ff, 1.0), torch.from_numpy(matrix).float()


def test_metrics_of_hand_made_arrays() -> None:
    active = torch.tensor([[True, True, False, False], [True, False, False, True]])
    predicted = torch.tensor([[True, False, True, False], [True, False, False, True]])
    counts = report.Counts.of(predicted, active)
    assert counts == report.Counts(hit=3, missed=1, wrong=1, silent=3)
    assert (counts.recall, counts.precision) == (0.75, 0.75)
    assert (counts.false_negatives, counts.false_positives) == (0.25, 0.25)
    assert (counts.active, counts.predicted) == (0.5, 0.5)
    nothing = report.Counts()
    assert (nothing.recall, nothing.false_negatives, nothing.false_positives) == (1.0, 0.0, 0.0)


def test_the_threshold_misses_just_the_share_it_may() -> None:
    scores = torch.arange(20.0).reshape(2, 10)
    active = scores >= 0
    for share, missed in ((0.0, 0), (0.05, 1), (0.5, 10)):
        least = report.threshold(scores, active, share)
        assert report.Counts.of(scores > least, active).missed == missed


def test_svd_at_full_rank_is_exact_and_below_it_is_not() -> None:
    samples, matrix = planted(rank=32)
    bias = torch.full((len(matrix),), -1.28)
    exact = fit.quality(svd.decompose(matrix, bias, 32), samples)
    assert (exact.missed, exact.wrong) == (0, 0)
    assert exact.hit > 1000
    assert fit.quality(svd.decompose(matrix, bias, 8), samples).missed > 1000


def test_regression_finds_a_planted_low_rank_map() -> None:
    samples, matrix = planted(rank=6)
    bias = torch.full((len(matrix),), -1.28)
    regression = fit.Regression.of(matrix, bias, samples.inputs, samples.inputs)
    found = fit.calibrated(regression.map(6, 1.0), samples, fit.MapRecipe(false_negatives=0.02))
    counts = fit.quality(found, samples)
    assert counts.recall > 0.97
    assert counts.false_positives < 0.01
    assert float(regression.strengths[-6:].sum()) == pytest.approx(len(matrix), rel=0.02)


def test_regression_of_activity_alone_finds_what_two_maps_decide_together() -> None:
    samples, matrix = planted(rank=4, d_ff=256)
    inputs = torch.from_numpy(samples.inputs.astype(np.float32))
    both = (inputs @ matrix[:128].T > 0.5) & (inputs @ matrix[128:].T > 0)
    packed = np.packbits(both.numpy(), axis=1, bitorder="little")
    of_both = Samples(samples.inputs, packed, 128, 1.0)
    found = fit.Regression.of_activity(of_both.part(0, 3072))
    held_out = of_both.part(3072, 4096)
    counts = fit.quality(fit.calibrated(found.map(4, 1.0), of_both.part(0, 3072), fit.MapRecipe()), held_out)
    gate = fit.Regression.of(matrix[:128], torch.zeros(128), samples.inputs[:3072], samples.inputs[:3072])
    alone = fit.quality(fit.calibrated(gate.map(4, 1.0), of_both.part(0, 3072), fit.MapRecipe()), held_out)
    assert 0.05 < counts.active < 0.3
    assert counts.recall == pytest.approx(0.95, abs=0.02)
    assert counts.false_positives < 0.8 * alone.false_positives
    uncalibrated = fit.quality(found.map(4, 1.0), held_out)
    assert uncalibrated.predicted == pytest.approx(uncalibrated.active, rel=0.25), "scores are log-odds"


def test_every_threshold_misses_its_share() -> None:
    samples, matrix = planted(rank=6)
    bias = torch.full((len(matrix),), -1.28)
    recipe = fit.MapRecipe(false_negatives=0.05, guesses_miss=0.3, resident_miss=0.02, absent_miss=0.1)
    found = fit.calibrated(svd.decompose(matrix, bias, 3), samples, recipe)
    inputs, active = samples.rows(slice(None))
    scores = found.scores(inputs)
    for least, share in ((found.resident, 0.02), (0.0, 0.05), (found.absent, 0.1), (found.guess, 0.3)):
        counts = report.Counts.of(scores > least, active)
        assert counts.false_negatives == pytest.approx(share, abs=1e-3)


def test_training_learns_from_a_start_that_knows_nothing() -> None:
    samples, matrix = planted(rank=6)
    generator = torch.Generator().manual_seed(0)
    start = lowmap.LowMap(
        torch.randn(6, 32, generator=generator) * 0.1,
        torch.randn(len(matrix), 6, generator=generator) * 0.1,
        torch.zeros(len(matrix)),
    )
    learn, held_out = samples.part(0, 3072), samples.part(3072, 4096)
    recipe = fit.MapRecipe(epochs=20, rate=0.05, batch=256)
    before = fit.quality(fit.calibrated(start, learn, fit.MapRecipe()), held_out)
    trained = fit.train(start, learn, held_out, recipe, CPU)
    after = fit.quality(fit.calibrated(trained, learn, fit.MapRecipe()), held_out)
    assert after.recall > 0.9
    assert after.false_positives < 0.25 * before.false_positives


def test_gradients_are_those_of_the_weighted_cross_entropy() -> None:
    samples, matrix = planted(rank=6, rows=64)
    inputs, active = samples.rows(slice(None))
    generator = torch.Generator().manual_seed(0)
    shapes = ((6, 32), (len(matrix), 6), (len(matrix),))
    ours = [torch.randn(shape, generator=generator) for shape in shapes]
    theirs = [part.clone().requires_grad_() for part in ours]
    fit._gradients(ours, inputs, active)
    truth = active.float()
    weight = truth.mean() + 0.005
    loss = torch.nn.functional.binary_cross_entropy_with_logits(
        inputs @ theirs[0].T @ theirs[1].T + theirs[2], truth, truth * (1 - weight) + weight
    )
    (loss * fit.GRADIENT_SCALE).backward()
    for mine, reference in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.grad, reference.grad, rtol=1e-4, atol=1e-5)


def test_more_rank_goes_where_the_spectrum_is_flat() -> None:
    easy = torch.tensor([0.0] * 24 + [1.0] * 7 + [100.0])
    hard = torch.full((32,), 10.0)
    ranks = fit.allot([easy, hard], 40)
    assert sum(ranks) <= 40
    assert ranks[1] > 3 * ranks[0] > 0


def test_activations_are_those_of_the_dense_model(store: Store, tokens: np.ndarray, tmp_path: Path) -> None:
    recorded = activations.record(store, tokens, tmp_path)
    for layer in range(len(store.layout.layers)):
        samples = recorded.samples(layer, 0)
        ((up, bias),) = activations.deciding(store, layer)
        inputs, active = samples.rows(slice(None))
        pre = inputs @ up.T + bias
        sure = pre.abs() > 0.05  # inputs are rounded to float16
        assert sure.float().mean() > 0.9
        assert torch.equal((pre > 0)[sure], active[sure])
    embedding = recorded.inputs(-1).astype(np.float32)
    assert float((embedding**2).mean()) == pytest.approx(1, abs=0.2)


def test_the_file_is_read_by_the_ring_and_better_than_chance(
    store: Store, tokens: np.ndarray, tmp_path: Path
) -> None:
    split = Split.of(len(tokens) - 4, 4, tokens.shape[1])
    reports = make(store, tokens, split, TrainingJob(rank=24), "file", tmp_path)
    assert len(reports) == 2 * len(store.layout.layers)
    for one in reports:
        if one.lookahead == 0:
            assert one.recall > one.predicted + 0.2  # chance has as much recall as it predicts
    scorer = lowrank.load(store, "file", Forecast("lowrank", 1, True, cache_aware=True), 0.0)
    recorded = activations.Activations(tmp_path / "activations", store)
    for own in (True, False):
        samples = recorded.samples(1, 0 if own else 1)
        found = lowmap.LowMap.read(
            Tensors(store.path / PREDICTORS / "file.safetensors"), "inlayer.1" if own else "layers.1"
        )
        row = samples.rows(slice(0, 1))[0]
        scores = found.scores(row)[0].numpy() - (0.0 if own else found.guess)
        mask = scorer.active(1, row[0].numpy() / samples.scale, own)
        sure = np.abs(scores) > 1e-2
        assert np.array_equal(mask[sure], (scores > 0)[sure])
        if own:
            assert found.resident < 0 < found.absent
            certain, doubtful = scorer.wanted(1, row[0].numpy() / samples.scale, own)
            assert certain.size < np.count_nonzero(mask) < certain.size + doubtful.size
    with safe_open(store.path / PREDICTORS / "file.safetensors", "np") as file:
        told = json.loads(file.metadata()["report"])
    assert [one["layer"] for one in told["layers"]] == list(range(len(store.layout.layers))) * 2


def test_the_rings_first_layer_sees_what_its_map_was_trained_on(
    store: Store, tokens: np.ndarray, tmp_path: Path
) -> None:
    """Layers below the look-ahead are predicted from embeddings, whose size is unlike an FFN input's."""
    job = TrainingJob(rank=24, inlayer=False, method="regression")
    make(store, tokens, Split.of(len(tokens), 0, tokens.shape[1]), job, "first", tmp_path)
    chosen = config(predictor={"kind": "lowrank", "refine": False}, model={"predictor": "first"})
    chooser = make_chooser(store, chosen)
    assert chooser is not None
    found = []
    with DenseModel(store, 1) as model, torch.no_grad():
        forward(model, tokens, chooser, lambda layer, sets: found.append(sets.predicted))
    made = lowmap.LowMap.read(Tensors(store.path / PREDICTORS / "first.safetensors"), "layers.0")
    samples = activations.Activations(tmp_path / "activations", store).samples(0, 1)
    scores = made.scores(samples.rows(slice(None))[0])
    sure = scores.abs() > 1e-2
    assert sure.float().mean() > 0.9
    assert torch.equal(found[0][sure], (scores > 0)[sure])
    assert 0.02 < float(found[0].float().mean()) < 0.98


def test_early_maps_learn_from_what_is_announced_before_attention(
    store: Store, tokens: np.ndarray, tmp_path: Path
) -> None:
    split = Split.of(len(tokens), 0, tokens.shape[1])
    own = make(store, tokens, split, TrainingJob(0, rank=24, method="regression"), "own", tmp_path)
    inputs = activations.Activations(tmp_path / "activations", store).inputs(2).copy()
    early = make(
        store, tokens, split, TrainingJob(0, rank=24, method="regression", early=True), "early", tmp_path
    )
    recorded = activations.Activations(tmp_path / "activations", store)
    assert not np.array_equal(recorded.inputs(2), inputs)  # recorded anew
    heard = []
    with DenseModel(store, 1) as model, torch.no_grad():
        x = model.embed(tokens)
        for layer in range(3):
            _, x = model.layer(layer, x, lambda _, announced, __: heard.append(announced), early=True)
    np.testing.assert_allclose(recorded.inputs(2), heard[2], atol=0.01)
    np.testing.assert_allclose(recorded.targets(2), inputs, atol=0.01)  # what the regression aims at
    assert [one.active for one in own] == [one.active for one in early]
    # Chance has as much recall as it predicts; before the first attention there is little to go by.
    assert all(one.recall > one.predicted + 0.03 for one in early)
    assert all(one.recall > one.predicted + 0.15 for one in early[1:])
    for name, wanted in (("own", False), ("early", True)):
        chosen = config(predictor={"kind": "lowrank", "lookahead": 0}, model={"predictor": name})
        assert plan(store, chosen).plan.forecast.early is wanted


def test_resuming_gives_the_same_bytes(store: Store, tokens: np.ndarray, tmp_path: Path) -> None:
    split = Split.of(len(tokens), 0, tokens.shape[1])
    job = TrainingJob(rank=8)

    def file(name: str) -> bytes:
        return (store.path / PREDICTORS / f"{name}.safetensors").read_bytes()

    make(store, tokens, split, job, "whole", tmp_path / "whole")

    class Stopped(Exception):
        pass

    def stop(stage: str, at: int) -> Callable[[str, int, int], None]:
        def told(what: str, done: int, total: int) -> None:
            if (what, done) == (stage, at):
                raise Stopped

        return told

    for stage, at in (("activations", 1), ("predictors", 1)):
        with pytest.raises(Stopped):
            make(store, tokens, split, job, "resumed", tmp_path / "part", told=stop(stage, at))
        assert not (store.path / PREDICTORS / "resumed.safetensors").exists()
    first = sorted((tmp_path / "part" / "maps").iterdir())
    assert len(first) == 1
    written = first[0].stat().st_mtime_ns
    make(store, tokens, split, job, "resumed", tmp_path / "part")
    assert file("resumed") == file("whole")
    assert first[0].stat().st_mtime_ns == written


def test_a_disk_that_fills_up_meanwhile_is_one_sentence(tmp_path: Path) -> None:
    """A mapped file would end the process by SIGBUS; only a file-size limit is at hand without a disk."""
    script = (
        "import resource, sys, numpy as np\n"
        "from pathlib import Path\n"
        "from storage.errors import DiskFull\n"
        "from workers.lab.training.activations import _Output\n"
        "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "output = _Output(Path(sys.argv[1]) / 'rows.npy', (4096, 64))\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))\n"
        "try:\n"
        "    output.put(0, np.ones((4096, 64), 'f2'))\n"
        "    output.finish()\n"
        "except DiskFull as error:\n"
        "    print(error)\n"
    )
    line = [sys.executable, "-c", script, str(tmp_path)]
    done = subprocess.run(line, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "rows.npy.partial cannot be written (File too large); make room" in done.stdout


def test_rows_are_written_as_numpy_reads_them(tmp_path: Path) -> None:
    rows = np.arange(12, dtype=np.float32).reshape(6, 2)
    output = activations._Output(tmp_path / "rows.npy", rows.shape, "f4")
    output.put(0, rows[:4])
    assert not (tmp_path / "rows.npy").exists()
    output.put(4, rows[4:])
    output.finish()
    np.testing.assert_array_equal(np.load(tmp_path / "rows.npy", mmap_mode="r"), rows)


def test_only_one_training_writes_a_work_directory(store: Store, tmp_path: Path, here: Any) -> None:
    text, work = tmp_path / "text.txt", tmp_path / "work"
    text.write_text("Once upon a time there was a small model. " * 200, encoding="utf-8")
    work.mkdir()
    with locked(work, "training"):
        done = here(training.run, "--store", store.path, "--text", text, "--work", work)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == f"flashring: another training is writing {work}"
    assert list(work.iterdir()) == []


def test_auto_rank_keeps_the_budget(store: Store, tokens: np.ndarray, tmp_path: Path) -> None:
    split = Split.of(len(tokens), 0, tokens.shape[1])
    make(store, tokens, split, TrainingJob(budget=0.5, method="regression"), "small", tmp_path)
    ffn = store.layout.useful_bytes
    tensors = Tensors(store.path / PREDICTORS / "small.safetensors")
    held = sum(tensors.read(name).nbytes for name in tensors.names)
    assert 0.35 * ffn < held <= 0.5 * ffn
    with pytest.raises(UsageError, match="budget"):
        make(store, tokens, split, TrainingJob(budget=0.001), "none", tmp_path)


def test_predictors_of_another_store_are_refused(store: Store, tokens: np.ndarray, tmp_path: Path) -> None:
    split = Split.of(len(tokens), 0, tokens.shape[1])
    make(store, tokens, split, TrainingJob(rank=4, method="svd"), "foreign", tmp_path / "work")
    other = convert(
        checkpoints.write_checkpoint(tmp_path / "checkpoint", "opt", seed=1), tmp_path / "store", name="other"
    )
    (other.path / PREDICTORS).mkdir()
    name = f"{PREDICTORS}/foreign.safetensors"
    (other.path / name).write_bytes((store.path / name).read_bytes())
    with pytest.raises(StoreError, match="other weights"):
        lowrank.load(other, "foreign", Forecast("lowrank", 1, False), 0.0)


def test_a_model_without_relu_is_refused(tmp_path: Path) -> None:
    where = checkpoints.write_checkpoint(tmp_path / "checkpoint", "opt-gelu")
    gelu = convert(where, tmp_path / "store", name="gelu")
    with pytest.raises(UnsupportedModel, match="gelu activations: low-rank predictors need a ReLU model"):
        make(gelu, np.zeros((4, 8), np.int64), Split(8, 16, 24), TrainingJob(), "no", tmp_path / "work")
    assert not (tmp_path / "work").exists()


def test_texts_plain_and_lines_and_packed(store: Store, tmp_path: Path) -> None:
    (tmp_path / "plain.txt").write_text("once upon a time\n" * 100, encoding="utf-8")
    lines = "".join(json.dumps({"text": "once upon a time"}) + "\n" for _ in range(100))
    (tmp_path / "lines.jsonl.xz").write_bytes(lzma.compress(lines.encode()))
    length = min(texts.LONGEST_ROW, store.architecture.max_positions, 200)
    for name in ("plain.txt", "lines.jsonl.xz"):
        rows = texts.rows(tmp_path / name, store, 200)
        assert rows.shape == (200 // length, length)
    (tmp_path / "bad.jsonl").write_text('{"text": "x"}\n{"no": 1}\n', encoding="utf-8")
    with pytest.raises(UsageError, match="line 2"):
        texts.rows(tmp_path / "bad.jsonl", store, 200)
    (tmp_path / "empty.txt").write_text("", encoding="utf-8")
    with pytest.raises(UsageError, match=r"0 tokens|1 tokens"):
        texts.rows(tmp_path / "empty.txt", store, 200)
    with pytest.raises(UsageError, match="cannot be read"):
        texts.rows(tmp_path / "absent.txt", store, 200)
    (tmp_path / "numbers.txt").write_text(" ".join(map(str, range(300))), encoding="utf-8")
    whole = texts.rows(tmp_path / "numbers.txt", store, 120)[0]
    assert texts.rows(tmp_path / "numbers.txt", store, 60, skip=20)[0].tolist() == whole[20:80].tolist()
    few, more = texts.two(tmp_path / "numbers.txt", tmp_path / "plain.txt", store, 80)
    assert (few.shape, more.shape) == ((4, 20), (1, 20))
    assert few.reshape(-1).tolist() == whole[:80].tolist()
    Split.of(4, 0, 20)  # is enough to train, to calibrate and to report on
