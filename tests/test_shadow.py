"""The shadow: its file, what it computes and chooses, and a layer loop over it in one process."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import write_checkpoint
from decoding import LocalDecoder
from ring import config, plan_for

from pipeline.config import Config
from pipeline.planner.divide import plan
from pipeline.planner.resolve import resolve
from pipeline.ring.plan import Forecast
from storage import shadow as shadows
from storage.convert import convert
from storage.errors import BudgetError, ConfigError, StoreCorrupt, StoreError, UsageError
from storage.shadow import Shadow
from storage.store import Store
from storage.verify import verify
from workers import kernels
from workers.compute.cpu.device import CpuDevice
from workers.compute.cpu.shadow import CpuShadow, read
from workers.compute.look_ahead import LookAhead, Pace
from workers.compute.weights import Weights
from workers.lab.offline.local_ring import LocalRing

pytestmark = pytest.mark.kernels("a shadow is computed by them")

PROMPT, TOKENS = [2, 17, 40, 9, 77, 31], [5, 80, 33, 61, 12, 240, 9, 44]
# Of a parallel block, a sequential one with biases, and a gated FFN.
VARIANTS = {
    "falcon-7b": {"hidden_size": 128, "num_attention_heads": 4},
    "falcon-sequential": {"hidden_size": 128, "num_attention_heads": 4},
    "llama": {},
}


def make_store(base: Path, variant: str) -> Store:
    checkpoint = write_checkpoint(base / "checkpoint", variant, "bfloat16", changes=VARIANTS[variant])
    store = convert(checkpoint, base / "store", name=variant)
    shadows.write(store, 4)
    return store


@pytest.fixture(scope="module", params=VARIANTS)
def store(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Store:
    return make_store(tmp_path_factory.mktemp("shadow"), request.param)


@pytest.fixture(scope="module")
def falcon(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return make_store(tmp_path_factory.mktemp("falcon"), "falcon-7b")


def settings(share: float, **changes: object) -> Config:
    return config(predictor={"kind": "shadow", "full_rows": share, "refine": None, **changes})


def low_bits(store: Store, share: float, threads: int = 1, **changes: object) -> CpuShadow:
    forecast = Forecast("shadow", 0, False, full_rows=share, **changes)
    return CpuShadow(Weights(store), read(Shadow.open(store)), forecast, threads)


class Rows:
    """One layer's, widened: in full, and as the shadow has them."""

    def __init__(self, store: Store, layer: int) -> None:
        file = Shadow.open(store)
        unit = file.unit(layer)
        memory = np.zeros((file.units(layer), unit.stride), np.uint8)
        self.lengths = file.read(layer, memory)
        roles = [row.role for row in unit.rows]
        self.low = {role: unit.view(memory, role).widened() for role in roles}
        if unit.width > 1:  # its down rows are the outputs'
            by_output = self.low["down"].reshape(-1, unit.d_model, unit.width)
            self.low["down"] = by_output.swapaxes(1, 2).reshape(-1, unit.d_model)
        self.full = {role: rows.widened() for role, rows in zip(roles, store.ffn(layer, *roles), strict=True)}
        self._ffn, self._weights, self._layer = store.architecture.layers[layer].ffn, Weights(store), layer

    def activations(self, x: np.ndarray, rows: dict[str, np.ndarray]) -> np.ndarray:
        """[units], in float64."""
        up = rows["up"].astype(np.float64) @ x + self._bias("up")
        if self._ffn.kind == "gated":
            gate = rows["gate"].astype(np.float64) @ x + self._bias("gate")
            return torch.nn.functional.silu(torch.from_numpy(gate)).numpy() * up
        return torch.nn.functional.gelu(torch.from_numpy(up)).numpy()

    def output(self, x: np.ndarray, chosen: np.ndarray) -> np.ndarray:
        """The chosen in full, the others in few bits."""
        full, low = self.activations(x, self.full), self.activations(x, self.low)
        full[~chosen], low[chosen] = 0, 0
        return full @ self.full["down"] + low @ self.low["down"] + self._bias("down")

    def _bias(self, role: str) -> np.ndarray | float:
        bias = self._weights.vector(f"layers.{self._layer}.{role}.bias")
        return bias if bias.size else 0.0


class Reference(LocalDecoder):
    """The decoder with FFNs in numpy: a token's as it should be, a prompt's in full."""

    def __init__(self, store: Store, share: float) -> None:
        super().__init__(store)
        self._rows = [Rows(store, index) for index in range(len(store.layout.layers))]
        self._share = share

    def ffn(self, index: int, ffn_input: np.ndarray) -> np.ndarray:
        rows, outputs = self._rows[index], []
        for x in ffn_input:
            scores = np.abs(rows.activations(x, rows.low)) * rows.lengths
            count, chosen = round(self._share * scores.size), np.zeros(scores.size, np.bool_)
            chosen[np.argsort(-scores)[:count]] = True
            outputs.append(rows.output(x, chosen | (ffn_input.shape[0] > 1)))
        return np.array(outputs, np.float32)


def logits(store: Store, chosen: Config, slots: int | None = None, staging: int | None = None) -> np.ndarray:
    """Of every token after the prompt's, from a ring in this process."""
    ring_plan = plan_for(store, chosen, slots, staging)
    units = [store.read_layer(index) for index in range(len(store.layout.layers))]
    with LocalRing(store, chosen, ring_plan, Weights(store), units, threads=1) as ring:
        ring.prefill(PROMPT)
        return np.stack([ring.step(len(PROMPT) + at, token) for at, token in enumerate(TOKENS)])


# -- what it foresees -------------------------------------------------------------------------------


def test_a_layer_is_foreseen_from_the_input_of_the_one_before(store):
    """As from the same stream behind its own norm; a parallel block's is there before attention anyway."""
    shadow, layers = low_bits(store, 0.1), store.architecture.layers
    device = CpuDevice(Weights(store), context=8, threads=1)
    stream = np.random.default_rng(5).normal(size=(1, store.architecture.d_model)).astype(np.float32)
    assert [shadow.foresees(index) for index in range(len(layers))] == [
        index > 0 and not layers[0].parallel for index in range(len(layers))
    ]
    if not layers[0].parallel:
        announced = device.norm(0, "ffn_input", stream)
        expected = shadow.choose(1, device.norm(1, "ffn_input", stream)).certain
        foreseen = shadow.foresee(1, announced)
        assert np.intersect1d(foreseen, expected).size >= expected.size - 1  # a tie may fall otherwise
    shadow.close()
    device.close()


@pytest.mark.parametrize("variant", ["llama", "falcon-sequential"])
def test_guesses_start_reads_and_leave_the_numbers_alone(variant, tmp_path, monkeypatch):
    """Bit for bit; with few slots some of what is wanted is being read when the set is known."""
    store, made = make_store(tmp_path, variant), []
    monkeypatch.setattr(Pace, "pays", True)
    guess = LookAhead.guess
    monkeypatch.setattr(LookAhead, "guess", lambda self, *rest: (made.append(rest[2]), guess(self, *rest)))
    expected = logits(store, settings(0.2, guesses=0), slots=30)
    assert made == []
    assert np.array_equal(logits(store, settings(0.2), slots=30), expected)
    assert set(made) == set(range(1, len(store.layout.layers)))


def test_guesses_stop_where_reads_leave_no_time():
    pace = Pace()
    assert pace.pays
    pace.guessed(0.002)
    for _ in range(40):
        pace.waited(0.0)
    assert not pace.pays
    for _ in range(40):
        pace.waited(0.005)
    assert pace.pays


# -- what it computes -------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.05, 0.3])
def test_a_token_has_the_best_units_in_full_and_the_others_in_few_bits(store, share, monkeypatch):
    monkeypatch.setattr(kernels.ACTIVATIONS, "exact", True)
    with Reference(store, share) as reference:
        reference.prefill(PROMPT)
        expected = np.stack([reference.step(token) for token in TOKENS])
        np.testing.assert_allclose(logits(store, settings(share)), expected, rtol=2e-4, atol=2e-4)


def test_all_rows_are_the_exact_model_bit_for_bit(store):
    exact = config(predictor={"kind": "all", "refine": None})
    assert np.array_equal(logits(store, settings(1.0)), logits(store, exact))


def test_few_full_rows_change_the_logits_less_than_none(store):
    exact = logits(store, config(predictor={"kind": "all", "refine": None}))
    errors = [np.square(logits(store, settings(share)) - exact).mean() for share in (0.01, 0.2, 0.6)]
    assert errors[0] > errors[1] > errors[2] > 0


def test_no_rows_are_the_low_bit_model_in_prompts_as_well(store, monkeypatch):
    monkeypatch.setattr(kernels.ACTIVATIONS, "exact", True)
    nobody = np.zeros(store.layout.most_units, np.bool_)
    some = np.random.default_rng(3).normal(size=(3, store.architecture.d_model)).astype(np.float32)
    low = low_bits(store, 0.0)
    try:
        for index in range(len(store.layout.layers)):
            rows = Rows(store, index)
            expected = np.array([rows.output(x, nobody) for x in some])
            np.testing.assert_allclose(low.ffn(index, some, every=True), expected, rtol=1e-4, atol=1e-4)
            np.testing.assert_allclose(
                low.ffn(index, some[:1], every=False), expected[:1], rtol=1e-4, atol=1e-4
            )
    finally:
        low.close()


@pytest.mark.parametrize(("slots", "staging"), [(1, 3), (7, 5), (40, 96)])
def test_the_logits_do_not_hang_on_the_cache(store, slots, staging):
    expected = logits(store, settings(0.2))
    assert np.array_equal(logits(store, settings(0.2), slots, staging), expected)


def test_pinned_layers_are_computed_in_full(store):
    layers = range(len(store.layout.layers))
    exact = config(predictor={"kind": "all", "refine": None})
    pinned = settings(0.1, pinned_layers=tuple(layers))
    assert np.array_equal(logits(store, pinned), logits(store, exact))
    assert not np.array_equal(logits(store, settings(0.1, pinned_layers=(0,))), logits(store, exact))


# -- what it chooses --------------------------------------------------------------------------------


def test_the_largest_scores_are_chosen_and_equal_ones_by_id(store):
    low = low_bits(store, 0.25)
    try:
        x = np.random.default_rng(1).normal(size=(1, store.architecture.d_model)).astype(np.float32)
        chosen, rows = low.choose(1, x).certain, Rows(store, 1)
        scores = np.abs(rows.activations(x[0], rows.low)) * rows.lengths
        assert chosen.size == round(0.25 * scores.size)
        assert (np.diff(chosen) > 0).all()
        others = np.delete(scores, chosen)
        assert scores[chosen].min() > 0.98 * others.max()  # products of one token are rounded
        assert low.choose(1, 0 * x).certain.size == chosen.size
    finally:
        low.close()


def test_the_choice_does_not_hang_on_threads(store):
    x = np.random.default_rng(1).normal(size=(1, store.architecture.d_model)).astype(np.float32)
    found = []
    for threads in (1, 2):
        low = low_bits(store, 0.2, threads)
        found.append((low.choose(0, x).certain.tolist(), low.rest().tolist()))
        low.close()
    assert found[0] == found[1]


def test_cache_aware_doubts_below_the_threshold(store):
    x = np.random.default_rng(1).normal(size=(1, store.architecture.d_model)).astype(np.float32)
    strict, aware = low_bits(store, 0.2), low_bits(store, 0.2, cache_aware=True)
    try:
        choice = aware.choose(0, x)
        assert choice.certain.tolist() == strict.choose(0, x).certain.tolist()
        assert choice.doubtful.size
        assert not np.intersect1d(choice.certain, choice.doubtful).size
    finally:
        strict.close()
        aware.close()


def test_cache_aware_computes_more_in_full_where_units_are_resident(falcon):
    units = falcon.layout.most_units
    exact = logits(falcon, config(predictor={"kind": "all", "refine": None}))
    aware, strict = (
        np.square(logits(falcon, settings(0.1, cache_aware=one), units) - exact).mean()
        for one in (True, False)
    )
    assert 0 < aware < strict


# -- its file ---------------------------------------------------------------------------------------


def test_the_lengths_are_those_of_the_full_down_rows(store):
    rows = Rows(store, 0)
    np.testing.assert_allclose(rows.lengths, np.linalg.norm(rows.full["down"], axis=1), rtol=1e-6)
    for role, full in rows.full.items():
        assert np.abs(rows.low[role] - full).max() <= np.ptp(full) / 15


def test_eight_bits_are_nearer(falcon, tmp_path):
    before = Rows(falcon, 0).low["up"]
    try:
        shadows.write(falcon, 8)
        rows = Rows(falcon, 0)
        assert (
            np.square(rows.low["up"] - rows.full["up"]).sum()
            < 0.1 * np.square(before - rows.full["up"]).sum()
        )
    finally:
        shadows.write(falcon, 4)


def test_verify_finds_a_damaged_shadow(tmp_path):
    store = make_store(tmp_path, "falcon-7b")
    verify(store.path)
    path = shadows.path_of(store)
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    with pytest.raises(StoreCorrupt, match="does not match its hash: make it again"):
        verify(store.path)


def test_a_shadow_of_other_weights_is_refused(falcon):
    entry = falcon.manifest.files["bundles.bin"]
    files = {**falcon.manifest.files, "bundles.bin": replace(entry, xxh3_128="1" * 32)}
    other = replace(falcon, manifest=replace(falcon.manifest, files=files))
    with pytest.raises(StoreError, match="is of other weights: make it again"):
        Shadow.open(other)


def test_what_cannot_have_a_shadow_says_why(tmp_path):
    checkpoint = write_checkpoint(tmp_path / "checkpoint", "falcon-7b", "bfloat16")
    odd = convert(checkpoint, tmp_path / "odd", name="odd")
    with pytest.raises(UsageError, match="rows of 80 values, as those of odd, cannot be written in 4 bits"):
        shadows.write(odd, 4)
    with pytest.raises(UsageError, match="a shadow has 4 or 8 bits, not 3"):
        shadows.write(odd, 3)
    with pytest.raises(StoreError, match="has no shadow: make one with"):
        resolve(odd, settings(0.1))


# -- planning ---------------------------------------------------------------------------------------


def test_the_plan_counts_the_shadow(falcon):
    with_it, without = (
        plan(falcon, settings(0.1)),
        plan(falcon, config(predictor={"kind": "all", "refine": None})),
    )
    held = sum(one.memory.nbytes + one.lengths.nbytes for one in read(Shadow.open(falcon)))
    assert with_it.parts["shadow"] == held
    assert with_it.total - without.total >= held
    assert with_it.plan.forecast.lookahead == 0


def test_a_budget_without_room_for_the_shadow_is_refused_with_the_least_that_would_do(falcon):
    least = plan(falcon, settings(0.1).replace(memory={"budget": "2GiB"}, cache={"slots_per_layer": 1}))
    short = f"{least.total - 4096}B"
    with pytest.raises(BudgetError, match="the least that would do is"):
        plan(falcon, settings(0.1).replace(memory={"budget": short}))


def test_without_full_rows_there_are_no_slots_worth_the_name(falcon):
    for budget in ("", "2GiB"):
        found = plan(falcon, settings(0.0).replace(memory={"budget": budget}))
        assert found.plan.slots == (1,) * found.plan.layers


@pytest.mark.parametrize("changes", [{"cache_aware": True}, {"pinned_layers": (0,)}])
def test_what_is_about_full_rows_is_refused_without_any(falcon, changes):
    with pytest.raises(ConfigError, match="is about full rows"):
        resolve(falcon, settings(0.0, **changes))
