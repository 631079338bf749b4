"""Mixtures of experts without a ring: conversion, routing, kernels and what the planner gives them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import write_checkpoint
from decoding import LocalDecoder
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from stores import bundle_store

from pipeline.config import Config
from pipeline.planner.divide import least as least_plan
from pipeline.planner.divide import plan
from storage.architecture import Ffn, Router
from storage.codecs import CODECS
from storage.convert import convert
from storage.errors import BudgetError, ConfigError, UnsupportedModel, UsageError
from storage.families.registry import family_of
from storage.layout import Layout, Row, Unit
from storage.manifest import RESIDENT
from storage.store import Store
from storage.tensors import Tensors
from storage.verify import verify
from workers import kernels
from workers.compute.bound import BoundLayer, Linear
from workers.compute.cpu.experts import BatchExperts, TokenExperts
from workers.compute.cpu.pool import Pool
from workers.compute.cpu.units import UnitRows
from workers.lab.evaluation.points import measure as measure_points
from workers.lab.offline.chooser import make_chooser
from workers.lab.offline.dense import DenseModel
from workers.lab.training.activations import require_relu
from workers.predictor.router import RouterScorer
from workers.prefetcher.requests import RequestBuilder
from workers.routing import Routing, ranked, route

PROMPT = [2, 17, 40, 9, 77, 31, 250, 6, 101, 4, 55, 260]


UNUSED = np.zeros((1, 0), np.float32)  # logits of rows whose experts are chosen


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("mixture")
    return write_checkpoint(base / "model", "qwen3-moe-dense-layer", "bfloat16")


@pytest.fixture(scope="module")
def store(checkpoint: Path) -> Store:
    return convert(checkpoint, checkpoint.parent / "store", name="mixture")


# -- conversion -----------------------------------------------------------------------------------


def test_every_bit_of_every_expert_arrives(checkpoint: Path, store: Store) -> None:
    verify(store.path)
    source = load_file(checkpoint / "model.safetensors")
    resident = load_file(store.path / RESIDENT)
    for layer in (0, 2):
        rows = store.ffn(layer, "gate", "up", "down")
        for role, found in zip(("gate", "up", "down"), rows, strict=True):
            assert found.values.shape == (8, 64 * 64)
            for expert, values in enumerate(found.values):
                name = f"model.layers.{layer}.mlp.experts.{expert}.{role}_proj.weight"
                assert values.tobytes() == source.pop(name).view(torch.uint16).numpy().tobytes()
    assert store.layout.units == (8, 0, 8)
    for role in ("gate", "up", "down"):  # of the dense layer
        assert torch.equal(
            resident.pop(f"layers.1.shared_{role}.weight"),
            source.pop(f"model.layers.1.mlp.{role}_proj.weight"),
        )
    numbers = [torch.cat([value.reshape(-1) for value in one.values()]) for one in (resident, source)]
    assert torch.equal(numbers[0].sort().values, numbers[1].sort().values)


def test_stacked_experts_make_the_same_store(checkpoint: Path, store: Store, tmp_path: Path) -> None:
    """The form that transformers has in memory, as some checkpoints have it on disk."""
    tensors, stacked = load_file(checkpoint / "model.safetensors"), {}
    for layer in (0, 2):
        experts = f"model.layers.{layer}.mlp.experts"
        gate, up, down = (
            torch.stack([tensors.pop(f"{experts}.{expert}.{role}_proj.weight") for expert in range(8)])
            for role in ("gate", "up", "down")
        )
        stacked |= {f"{experts}.gate_up_proj": torch.cat((gate, up), 1), f"{experts}.down_proj": down}
    other = write_checkpoint(tmp_path / "model", "qwen3-moe-dense-layer", "bfloat16")
    save_file({**tensors, **stacked}, other / "model.safetensors")
    assert convert(other, tmp_path / "store", name="mixture").manifest.files == store.manifest.files


@pytest.mark.parametrize(("bits", "experts", "others"), [(8, "q8", "q8"), (4, "q4", "q8"), (16, None, None)])
def test_experts_take_the_low_bits(
    checkpoint: Path, tmp_path: Path, bits: int, experts: str | None, others: str | None
) -> None:
    store = convert(checkpoint, tmp_path / "store", name="mixture", bits=bits)
    for layer in (0, 2):
        assert {row.codec for row in store.layout.layers[layer].unit.rows} == {experts or "bfloat16"}
    places = Tensors(store.path / RESIDENT).places
    assert {places[f"layers.{layer}.router.weight"].dtype for layer in (0, 2)} == {"bfloat16"}
    for name in ("layers.1.shared_gate.weight", "layers.0.qkv.weight", "head.weight"):
        assert places[name].dtype == (others or "bfloat16")
    with LocalDecoder(store) as decoder, DenseModel(store, 1) as dense:
        expected = dense.forward([PROMPT])[0].numpy()
        assert expected.std() >= 1
        assert np.abs(decoder.prefill(PROMPT) - expected).max() < 1e-3
        # In few bits a token's inputs are rounded to 15 and 14 bits.
        assert np.abs(decoder.steps(PROMPT) - expected).max() < (1e-3 if bits == 16 else 0.1)


def test_experts_of_two_dtypes_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    tensors = load_file(checkpoint / "model.safetensors")
    name = "model.layers.2.mlp.experts.5.up_proj.weight"
    tensors[name] = tensors[name].float()
    other = write_checkpoint(tmp_path / "model", "qwen3-moe-dense-layer", "bfloat16")
    save_file(tensors, other / "model.safetensors")
    with pytest.raises(UnsupportedModel, match=r"experts\.5\.up_proj.*float32.*two dtypes"):
        convert(other, tmp_path / "store", name="mixture")


QWEN3_30B: dict[str, Any] = {  # as Qwen/Qwen3-30B-A3B's config.json has it
    "model_type": "qwen3_moe", "hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768,
    "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128,
    "num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True, "decoder_sparse_step": 1,
    "mlp_only_layers": [], "rope_theta": 1000000.0, "vocab_size": 151936, "max_position_embeddings": 40960,
    "tie_word_embeddings": False, "sliding_window": None, "use_sliding_window": False, "rms_norm_eps": 1e-6,
}  # fmt: skip


def test_qwen3_30b() -> None:
    model = family_of(QWEN3_30B).architecture(QWEN3_30B)
    assert model.layers == (model.layers[0],) * 48
    assert model.layers[0].ffn == Ffn("gated", 128, 768, "silu", router=Router(8, renormalise=True))
    assert model.layers[0].attention.head_dim == 128
    unit = Unit(tuple(Row(role, "q4") for role in ("gate", "up", "down")), 768, 2048)
    assert unit.bytes == 3 * 768 * 2048 * 20 // 32  # 2.95 MB, in groups of 32 with minima


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_experts_per_tok": 129}, "129 experts a token of 128"),
        ({"decoder_sparse_step": 49}, "without a layer that has experts"),
        ({"mlp_only_layers": "all"}, "mlp_only_layers"),
        ({"norm_topk_prob": "yes"}, "norm_topk_prob"),
    ],
)
def test_what_no_mixture_says(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UnsupportedModel, match=words):
        family_of(QWEN3_30B).architecture({**QWEN3_30B, **changes})


# -- routing --------------------------------------------------------------------------------------


def test_of_equal_logits_the_lower_ids_are_chosen() -> None:
    logits = np.array([[1, 3, 1, 3, 1, 0], [0, 0, 0, 0, 0, 0]], np.float32)
    assert ranked(logits, 3).tolist() == [[1, 3, 0], [0, 1, 2]]
    assert route(Router(3), logits).ids.tolist() == [[0, 1, 3], [0, 1, 2]]


ROUTERS = [
    Router(3),
    Router(3, renormalise=True),
    Router(3, over="chosen"),
    Router(3, scores="sigmoid"),
    Router(3, scores="sigmoid", renormalise=True, scale=2.5),
]


@pytest.mark.parametrize("router", ROUTERS, ids=str)
def test_weights_are_the_papers(router: Router) -> None:
    logits = np.random.default_rng(0).standard_normal((40, 16)).astype(np.float32) * 4
    found = route(router, logits)
    for row, ids, weights in zip(torch.tensor(logits).double(), found.ids, found.weights, strict=True):
        best = row.topk(3)
        assert sorted(best.indices.tolist()) == ids.tolist()
        scores = row.sigmoid() if router.scores == "sigmoid" else row.softmax(0)
        expected = scores[ids] if router.over == "all" else row[ids].softmax(0)
        expected = expected / expected.sum() if router.renormalise else expected
        assert np.allclose(weights, expected * router.scale, rtol=1e-5, atol=1e-7)


def test_the_predictor_chooses_what_compute_does(store: Store) -> None:
    """Of many rows, bit for bit the same sets; a guess is ranked by the same scores."""
    scorer = RouterScorer.load(store, plan(store, Config()).plan.forecast)
    rng = np.random.default_rng(0)
    with LocalDecoder(store) as decoder:
        device: Any = decoder.device
        for row in rng.standard_normal((50, 64)).astype(np.float32):
            device.begin(0, 1, every=False)
            device.route(2, row[None])
            certain, doubtful = scorer.wanted(2, row, own=True)
            assert certain.tolist() == device._token._routing.ids[0].tolist()
            assert not doubtful.size
    weights = Tensors(store.path / RESIDENT)
    norms = [weights.vector(f"layers.{layer}.ffn_norm.weight", (64,)) for layer in (1, 2)]
    guess, _ = scorer.wanted(2, row, own=False)
    logits = weights.vector("layers.2.router.weight", (8, 64)) @ (row * norms[1] / norms[0])
    assert guess.tolist() == np.argsort(-logits)[:3].tolist()


# -- computing ------------------------------------------------------------------------------------


WIDTH, D_MODEL, EXPERTS = 64, 128, 8


def _layer(codec: str) -> tuple[BoundLayer, Unit, Ffn, np.ndarray]:
    """A layer of random experts with biases, its unit and its units [experts, stride]."""
    rng = np.random.default_rng(1)
    unit = Unit(tuple(Row(role, codec) for role in ("gate", "up", "down")), WIDTH, D_MODEL)  # type: ignore[arg-type]
    memory = np.zeros((EXPERTS, unit.stride), np.uint8)
    for role in ("gate", "up", "down"):
        count, width = unit.shape(role)  # type: ignore[arg-type]
        values = rng.standard_normal((EXPERTS * count, width)).astype(np.float32) / 8
        unit.view(memory, role).values[:] = CODECS[codec].narrow(values).reshape(EXPERTS, -1)  # type: ignore[arg-type]
    sizes = (EXPERTS * WIDTH, EXPERTS * D_MODEL, EXPERTS * WIDTH)
    up, down, gate = (rng.standard_normal(size).astype(np.float32) for size in sizes)
    nothing: Any = Linear("", None, np.zeros(0, np.float32))  # type: ignore[arg-type]
    ffn = Ffn("gated", EXPERTS, WIDTH, "silu", router=Router(3))
    return BoundLayer({}, nothing, nothing, up, down, gate), unit, ffn, memory


@pytest.fixture
def pool() -> Iterator[Pool]:
    one = Pool(2)
    yield one
    one.close()


@pytest.mark.parametrize("codec", ["float32", "bfloat16", "q8", "q4"])
def test_an_experts_sum_does_not_depend_on_parts_slots_or_threads(codec: str, pool: Pool) -> None:
    """Parts in any order within a group, groups ascending, slots anywhere and given away afterwards."""
    bound, unit, ffn, memory = _layer(codec)
    x = np.random.default_rng(2).standard_normal((1, D_MODEL)).astype(np.float32)
    routing = Routing(np.array([[1, 4, 6]]), np.array([[0.5, 0.2, 0.3]], np.float32), UNUSED)
    found = []
    for threads, groups in (
        (1, [[range(8)]]),
        (2, [[[6], [1, 4]]]),
        (1, [[[1]], [[6], [4]]]),
        (2, [[[0, 3], [2, 1]], [[4]], [[7, 6]]]),
    ):
        one = TokenExperts(bound, UnitRows(unit), ffn, x[0], routing, None, threads)
        many = BatchExperts(bound, unit, ffn, x, routing, None, pool)
        for group in groups:
            slots = iter(range(len(memory)))
            places = np.full_like(memory, 255)  # not a number
            parts = [(np.array(part, np.int32), [next(slots) for _ in part]) for part in group]
            for ids, where in parts:
                places[where] = memory[ids]
                for each in (one, many):
                    each.add(ids, np.array(where, np.int32), places)
            for each in (one, many):
                each.close()
            places[:] = 255
        found.append((one.finish().tobytes(), many.finish().tobytes()))
    assert len(set(found)) == 1
    wide = {
        role: unit.view(memory, role).widened().reshape(EXPERTS, *unit.shape(role))
        for role in ("gate", "up", "down")
    }  # type: ignore[arg-type]
    expected = np.zeros(D_MODEL)
    for expert, weight in zip(routing.ids[0], routing.weights[0], strict=True):
        gate = wide["gate"][expert] @ x[0] + bound.gate_bias.reshape(EXPERTS, -1)[expert]
        up = wide["up"][expert] @ x[0] + bound.up_bias.reshape(EXPERTS, -1)[expert]
        output = wide["down"][expert] @ (gate / (1 + np.exp(-gate)) * up)
        expected += weight * (output + bound.down_bias.reshape(EXPERTS, -1)[expert])
    assert expected.std() > 0.1
    assert np.allclose(np.frombuffer(found[0][1], np.float32), expected, atol=1e-5)
    assert np.allclose(
        np.frombuffer(found[0][0], np.float32), expected, atol=1e-5 if codec[0] != "q" else 2e-2
    )


def test_an_expert_that_does_not_come_is_noticed() -> None:
    bound, unit, ffn, memory = _layer("float32")
    x = np.ones(D_MODEL, np.float32)
    routing = Routing(np.array([[1, 4, 6]]), np.ones((1, 3), np.float32), UNUSED)
    one = TokenExperts(bound, UnitRows(unit), ffn, x, routing, None, 1)
    ids = np.array([1, 6], np.int32)
    one.add(ids, ids, memory)
    one.close()
    with pytest.raises(AssertionError, match="has not come"):
        one.finish()


def test_threads_do_not_change_an_experts_output() -> None:
    _, unit, ffn, memory = _layer("float32")
    wide = np.tile(memory, (64, 1))  # enough for threads
    slots, x = np.arange(512, dtype=np.int32), np.linspace(-1, 1, D_MODEL, dtype=np.float32)
    rows = unit.view(wide, "gate"), unit.view(wide, "up"), unit.view(wide, "down")
    biases = kernels.NO_BIAS, kernels.NO_BIAS
    found = [kernels.outputs(rows, slots, slots, x, biases, ffn, threads) for threads in (1, 2)]
    assert found[0].tobytes() == found[1].tobytes()
    assert found[0].shape == (512, D_MODEL)


@pytest.mark.parametrize("scores", ["softmax", "sigmoid"])
@pytest.mark.parametrize("over", ["all", "chosen"])
@pytest.mark.parametrize("renormalise", [False, True])
def test_compiled_routing_is_numpys(scores: str, over: str, renormalise: bool) -> None:
    router = Router(5, scores, over, renormalise, 1.5)  # type: ignore[arg-type]
    random = np.random.default_rng(0)
    for _ in range(50):
        logits = np.round(random.standard_normal((1, 24)) * 3).astype(np.float32)  # with many equal ones
        expected, found = route(router, logits), kernels.choose(router, logits)
        assert found.ids.tolist() == expected.ids.tolist()
        assert np.allclose(found.weights, expected.weights, rtol=1e-6, atol=0)


# -- memory and reads -----------------------------------------------------------------------------


def test_a_token_s_experts_have_slots_in_every_plan(store: Store) -> None:
    smallest = least_plan(store, Config())
    assert smallest.plan.slots == (3, 0, 3)
    with pytest.raises(BudgetError, match=f"{-(-smallest.total // 2**20)}MiB"):
        plan(store, Config.parse({"memory": {"budget": f"{smallest.total - 2**20}B"}}))
    assert plan(store, Config.parse({"memory": {"budget": f"{smallest.total}B"}})).plan.slots == (3, 0, 3)
    more = plan(store, Config.parse({"memory": {"budget": f"{smallest.total + 2**20}B"}})).plan
    assert more.slots == (8, 0, 8)
    with pytest.raises(ConfigError, match="below the 3 experts"):
        plan(store, Config.parse({"cache": {"slots_per_layer": 2}}))


@pytest.mark.parametrize("kind", ["oracle", "lowrank"])
def test_other_predictors_are_refused(store: Store, kind: str) -> None:
    with pytest.raises(ConfigError, match="its own routers"):
        plan(store, Config.parse({"predictor": {"kind": kind}}))


def test_programs_for_neurons_refuse_a_mixture_in_one_sentence(store: Store) -> None:
    rows = np.zeros((1, 4), np.int64)
    with DenseModel(store, 1) as dense, pytest.raises(UsageError, match="compare sets of neurons"):
        measure_points(dense, [], rows, 0)
    with pytest.raises(UnsupportedModel, match="no predictors are trained"):
        require_relu(store)
    assert make_chooser(store, Config()) is None  # evaluation: every device chooses by itself


def test_a_router_needs_experts(tmp_path: Path) -> None:
    plain = bundle_store(tmp_path / "store")
    with pytest.raises(ConfigError, match="needs experts"):
        plan(plain, Config.parse({"predictor": {"kind": "router"}}))


@given(st.integers(1, 40), st.integers(1, 9), st.lists(st.integers(0, 7), min_size=1, unique=True))
def test_large_units_are_read_in_pieces(blocks: int, reads: int, ids: list[int]) -> None:
    """Every byte of a unit goes to its slot once, in reads of at most `max_read`, from aligned places."""
    unit = Unit((Row("up", "float32"),), 1, 128 * blocks)  # of `blocks` times 512 bytes
    layout, max_read = Layout.uniform(2, 8, unit), 4096 * reads
    stride, base = unit.stride, 1 << 40
    builder = RequestBuilder(base, 16, stride, layout, max_read, 0, 1 << 30)
    slots = np.arange(len(ids), dtype=np.int32)[::-1] + 3
    made = builder.build(1, np.array(ids, np.int32), slots.astype(np.int32))
    landed = {}
    for index in range(len(made)):
        offset = int(made.offsets[index])
        for address, length in made.vector(index):
            for at in range(0, length, 512):
                assert address + at not in landed
                landed[address + at] = offset + at
            offset += length
        assert made.lengths[index] <= max(max_read, stride if stride <= max_read else 0)
    expected = {
        base + slot * stride + at: layout.offset(1, one) + at
        for one, slot in zip(ids, slots.tolist(), strict=True)
        for at in range(0, stride, 512)
    }
    assert landed == expected
    assert made.bundles == len(ids)
    assert made.total_bytes == len(ids) * stride
