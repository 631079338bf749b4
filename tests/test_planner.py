"""The planner: what it divides never exceeds the budget, and the least it names is the least."""

from __future__ import annotations

import json
import math
import os
import re
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from pipeline.config import Config
from pipeline.console import size
from pipeline.planner import divide, machine
from pipeline.planner.budget import parse_budget
from pipeline.planner.probe import probe_rate
from pipeline.planner.resolve import resolve
from pipeline.ring import segments
from pipeline.ring.plan import Forecast, Plan
from storage.architecture import Activation, Architecture, Attention, Ffn, Layer, Norm
from storage.errors import BudgetError, ConfigError, StoreError, UsageError
from storage.layout import Layout, neuron
from storage.manifest import BUNDLES, PREDICTORS, RESIDENT, FileEntry, Manifest
from storage.store import Store

MIB = 1 << 20
NOWHERE = Path("/nonexistent")


def store(
    layers: int = 4,
    d_model: int = 256,
    d_ff: int = 2048,
    activation: Activation = "relu",
    resident: int = 50 * MIB,
    path: Path = NOWHERE,
    alignment: int = 512,
) -> Store:
    """A store that has only a manifest."""
    norm = Norm(1e-5)
    layer = Layer(
        attention=Attention(heads=4, kv_heads=4, head_dim=d_model // 4, scale=(d_model // 4) ** -0.5),
        ffn=Ffn("plain", d_ff, 1, activation),
        norms={"attention_input": norm, "ffn_input": norm},
    )
    architecture = Architecture(
        family="opt",
        d_model=d_model,
        vocabulary=5000,
        max_positions=1280,
        layers=(layer,) * layers,
        final_norm=norm,
        tied_head=True,
        embed_dim=d_model,
        learned_positions=None,
        bos_token=None,
        eos_tokens=(2,),
    )
    layout = Layout.uniform(layers, d_ff, neuron("float16", d_model, alignment))
    files = {RESIDENT: FileEntry(resident, ""), BUNDLES: FileEntry(layout.total_bytes, "")}
    return Store(path, Manifest(architecture, layout, "id", "model", files, {}))


def configured(**sections: dict[str, object]) -> Config:
    return Config.parse({"predictor": {"kind": "all"}, **sections})


stores = st.builds(
    store,
    layers=st.integers(1, 6),
    d_model=st.sampled_from([64, 256, 4544]),
    d_ff=st.sampled_from([64, 192, 2048, 18176]),
    resident=st.integers(0, 100 * MIB),
)
oddly_aligned = st.builds(
    store, d_model=st.sampled_from([12, 64, 500]), d_ff=st.just(18176), alignment=st.sampled_from([8, 64])
)
configurations = st.builds(
    lambda pinned, window, staging, context: configured(
        predictor={"kind": "all", "pinned_layers": pinned},
        cache={"window": window},
        prefetcher={"staging": staging},
        compute={"context": context},
    ),
    st.lists(st.sampled_from([0, -1]), max_size=2),
    st.integers(0, 8),
    st.integers(1, 64 * MIB),
    st.integers(0, 1280),
)


def with_budget(config: Config, budget: int) -> Config:
    return config.replace(memory={"budget": str(budget)})


def least(model: Store, config: Config) -> int:
    """The bytes that the refusal of a one-byte budget names."""
    with pytest.raises(BudgetError) as refusal:
        divide.plan(model, with_budget(config, 1))
    found = re.search(r"least that would do is (\d+)MiB$", str(refusal.value))
    assert found is not None
    return int(found[1]) * MIB


@given(stores, configurations)
def test_the_least_that_would_do_does_and_less_does_not(model: Store, config: Config) -> None:
    enough = least(model, config)
    assert divide.plan(model, with_budget(config, enough)).total <= enough
    with pytest.raises(BudgetError):
        divide.plan(model, with_budget(config, enough - MIB))


@given(st.one_of(stores, oddly_aligned), configurations, st.integers(0, 8 << 30), st.integers(0, 1 << 30))
def test_a_budget_is_kept_and_more_of_it_never_gives_fewer_slots(
    model: Store, config: Config, extra: int, more: int
) -> None:
    budget = least(model, config) + extra
    some = divide.plan(model, with_budget(config, budget))
    larger = divide.plan(model, with_budget(config, budget + more))
    assert some.total == sum(some.parts.values()) <= budget
    assert all(a <= b for a, b in zip(some.plan.slots, larger.plan.slots, strict=True))


@given(stores, configurations, st.integers(0, 8 << 30))
def test_no_room_for_another_slot_in_every_layer_is_left(model: Store, config: Config, extra: int) -> None:
    budget = least(model, config) + extra
    report = divide.plan(model, with_budget(config, budget))
    plan = report.plan
    open_layers = [plan.slots[layer] for layer in range(plan.layers) if layer not in plan.forecast.pinned]
    full = all(slots == plan.most_units for slots in open_layers)
    # Compute and the prefetcher map a slot, and the kernel pins it for reads.
    slot = plan.stride * (1 + 2 / divide.PAGE_TABLES + 1 / divide.PINNED_PAGES)
    assert full or report.total + len(open_layers) * slot > budget


@given(stores, configurations)
def test_parts_hold_what_the_segments_take(model: Store, config: Config) -> None:
    report = divide.plan(model, config)
    parts = report.parts
    assert parts["slots"] + parts["staging"] + parts["tables"] == sum(segments.sizes(report.plan).values())
    assert all(1 <= slots <= report.plan.most_units for slots in report.plan.slots)


def test_a_slot_takes_what_maps_and_pins_it() -> None:
    model = store(layers=1)
    few, many = (
        divide.plan(model, configured(cache={"slots_per_layer": slots})).parts for slots in (512, 1024)
    )
    more = many["slots"] - few["slots"]
    assert more == 512 * model.layout.stride
    assert many["page tables"] - few["page tables"] == 2 * more // 512 + more // 256


def test_scratch_is_for_the_threads_that_compute_may_have(monkeypatch: pytest.MonkeyPatch) -> None:
    """With `taskset` fewer than the machine has cores."""
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {4, 7})

    def scratch(threads: int) -> int:
        return divide.plan(store(), configured(compute={"threads": threads})).parts["activations"]

    assert scratch(1) < scratch(2) == scratch(0) == scratch(64)


def test_pinned_layers_have_a_slot_for_every_neuron() -> None:
    config = configured(predictor={"kind": "all", "pinned_layers": [0, -1]}, cache={"share": 0.25})
    plan = divide.plan(store(), config).plan
    assert plan.slots == (2048, 512, 512, 2048)
    assert plan.forecast.pinned == {0, 3}


GENEROUS = 1 << 50  # bytes available


def test_a_model_that_fits_the_machine_is_kept_whole() -> None:
    whole = divide.most(store(), configured()).total
    enough = math.ceil(whole / divide.FITS)
    kept = divide.plan(store(), configured(), available=enough)
    assert kept.plan.slots == (2048,) * 4
    assert kept.total == whole
    assert kept.config.cache.share == 1
    assert any(f"{size(enough)} are available" in line for line in kept.lines)
    cut = divide.plan(store(), configured(), available=enough - 2)
    assert cut.plan.slots == (512,) * 4
    assert cut.config.cache.share == divide.DEFAULT_SHARE
    assert any(f"would take {size(whole)}" in line for line in cut.lines)


def test_whoever_states_a_share_slots_or_a_budget_gets_them_on_any_machine() -> None:
    for cache, slots in (({"share": 0.25}, 512), ({"slots_per_layer": 7}, 7)):
        report = divide.plan(store(), configured(cache=cache), available=GENEROUS)
        assert report.plan.slots == (slots,) * 4
        assert not report.why
    stated = configured(cache={"share": 1.0})
    assert divide.plan(store(), stated, available=0).plan.slots == (2048,) * 4
    tight = with_budget(configured(), least(store(), configured()))
    assert max(divide.plan(store(), tight, available=GENEROUS).plan.slots) < 2048


def limited(group: Path, files: tuple[str, str, str], limit: str, usage: int, cached: int) -> None:
    """Write the files of a memory cgroup."""
    group.mkdir(parents=True, exist_ok=True)
    (group / files[0]).write_text(f"{limit}\n")
    (group / files[1]).write_text(f"{usage}\n")
    (group / "memory.stat").write_text(f"anon 5\n{files[2]} {cached}\n")


def test_a_cgroup_leaves_what_its_processes_do_not_use(tmp_path: Path) -> None:
    """Version 2: of the process's own group and of those above it; cached files are as good as free."""
    membership = tmp_path / "membership"
    membership.write_text("0::/slice/service\n")
    limited(tmp_path / "slice", machine.V2, str(100 * MIB), 60 * MIB, 10 * MIB)
    limited(tmp_path / "slice" / "service", machine.V2, "max", 20 * MIB, 0)
    assert machine.cgroup_rooms(membership, tmp_path) == [50 * MIB]
    limited(tmp_path / "slice" / "service", machine.V2, str(30 * MIB), 20 * MIB, 0)
    assert machine.cgroup_rooms(membership, tmp_path) == [10 * MIB, 50 * MIB]


def test_a_cgroup_of_version_1_and_of_a_container(tmp_path: Path) -> None:
    membership = tmp_path / "membership"
    membership.write_text("5:cpu:/\n4:memory:/docker/abc\n0::/\n")
    limited(tmp_path / "memory", machine.V1, str(64 * MIB), 16 * MIB, 1 * MIB)  # all that the container sees
    assert machine.cgroup_rooms(membership, tmp_path) == [49 * MIB]
    assert machine.cgroup_rooms(tmp_path / "no such file", tmp_path) == []


def test_what_is_available_is_the_least_of_machine_and_cgroups(monkeypatch: pytest.MonkeyPatch) -> None:
    free = machine.available_bytes()
    assert MIB < free <= psutil.virtual_memory().total
    monkeypatch.setattr(machine, "cgroup_rooms", lambda *_: [3 * MIB, 5 * MIB])
    assert machine.available_bytes() == 3 * MIB
    monkeypatch.setattr(machine, "cgroup_rooms", lambda *_: [-MIB])
    assert machine.available_bytes() == 0


def test_slots_per_layer_override_share_and_budget() -> None:
    config = configured(cache={"slots_per_layer": 77, "share": 1.0}, memory={"budget": "4GiB"})
    assert divide.plan(store(), config).plan.slots == (77,) * 4


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", None),
        ("7GiB", 7 << 30),
        ("1.5 GB", 1_500_000_000),
        ("512MiB", 512 * MIB),
        ("50%", (50 * MIB + 4 * 2048 * 2 * 512) // 2),
        ("50%+1GiB", (50 * MIB + 4 * 2048 * 2 * 512) // 2 + (1 << 30)),
    ],
)
def test_budgets_are_read(text: str, expected: int | None) -> None:
    assert parse_budget(text, store()) == expected


@pytest.mark.parametrize("text", ["much", "7 GiBs", "-1GiB", "50%+", "%"])
def test_other_budgets_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"memory\.budget takes a size"):
        parse_budget(text, store())


@pytest.mark.parametrize(("text", "meant"), [("8G", "8GiB"), ("50%+1g", "1giB"), ("512M", "512MiB")])
def test_a_size_in_another_programs_letters_is_told_what_it_may_mean(text: str, meant: str) -> None:
    with pytest.raises(ConfigError, match=rf"memory\.budget takes a size .*: say {meant}$"):
        parse_budget(text, store())


def test_a_budget_beyond_all_numbers_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"memory\.budget cannot be as large as 9999"):
        parse_budget(f"{'9' * 400}GiB", store())


@pytest.mark.parametrize(
    ("size", "stride", "d_ff", "expected"),
    [(16 * MIB, 16384, 16384, 1024), (5 * MIB, 18432, 18176, 256), (1 * MIB, 16384, 16384, 64),
     (1, 16384, 16384, 1), (16 * MIB, 512, 192, 192)],
)  # fmt: skip
def test_staging_is_whole_blocks_of_bundles(size: int, stride: int, d_ff: int, expected: int) -> None:
    assert divide.staging_slots(size, stride, d_ff) == expected


def test_a_context_of_zero_is_the_models_limit_or_2048() -> None:
    assert resolve(store(), configured()).config.compute.context == 1280


def test_a_context_beyond_the_models_limit_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"1,281 tokens is beyond the model's limit of 1,280"):
        resolve(store(), configured(compute={"context": 1281}))


def write_predictors(path: Path, lookahead: int, *prefixes: str) -> Path:
    """A file that has predictors' metadata and names."""
    file = path / PREDICTORS / "default.safetensors"
    file.parent.mkdir(exist_ok=True)
    tensors = {f"{prefix}.0.down": np.zeros((1, 4), np.float16) for prefix in prefixes}
    save_file(tensors, file, metadata={"lookahead": str(lookahead)})
    return file


def test_auto_takes_predictors_where_they_are(tmp_path: Path) -> None:
    model = store(path=tmp_path)
    assert resolve(model, Config()).forecast.kind == "all"
    file = write_predictors(tmp_path, 1, "layers")
    assert resolve(model, Config()).forecast.kind == "lowrank"
    assert divide.plan(model, Config()).parts["predictors"] == file.stat().st_size


@pytest.mark.parametrize(
    ("lookahead", "prefixes", "refine"),
    [(1, ("layers",), False), (1, ("layers", "inlayer"), True), (0, ("layers",), True)],
)
def test_refine_is_on_where_the_predictors_can(
    tmp_path: Path, lookahead: int, prefixes: tuple[str, ...], refine: bool
) -> None:
    write_predictors(tmp_path, lookahead, *prefixes)
    assert resolve(store(path=tmp_path), Config()).forecast.refine is refine


@pytest.mark.parametrize("predictor", [{"refine": True}, {"lookahead": 0}, {"lookahead": 2}])
def test_predictors_that_do_not_fit_are_refused_before_the_ring_starts(
    tmp_path: Path, predictor: dict[str, int]
) -> None:
    write_predictors(tmp_path, 1, "layers")
    with pytest.raises(ConfigError, match=r"set predictor\.lookahead=1 and predictor\.refine=false"):
        resolve(store(path=tmp_path), configured(predictor=predictor))


def test_cache_aware_needs_predictors_with_thresholds_by_residency(tmp_path: Path) -> None:
    model, chosen = store(path=tmp_path), configured(predictor={"cache_aware": True})
    with pytest.raises(ConfigError, match=r"cache_aware needs trained predictors, .*kind is all"):
        resolve(model, chosen)
    file = write_predictors(tmp_path, 1, "layers")
    with pytest.raises(ConfigError, match=r"no thresholds for predictor\.cache_aware"):
        resolve(model, chosen)
    one = np.ones(1, np.float32)
    maps = {"layers.0.bias": one, "layers.0.absent": one, "layers.1.bias": one}
    save_file(maps, file, metadata={"lookahead": "1"})
    with pytest.raises(ConfigError, match="no thresholds"):  # of one layer
        resolve(model, chosen)
    save_file({**maps, "layers.1.absent": one}, file, metadata={"lookahead": "1"})
    assert resolve(model, chosen).forecast.cache_aware


def header_of(metadata: object) -> bytes:
    text = json.dumps({"__metadata__": metadata}).encode()
    return struct.pack("<Q", len(text)) + text


@pytest.mark.parametrize(
    "data", [b"no header", b"", header_of(None), header_of(["lookahead"]), header_of({"lookahead": [1]})]
)
def test_damaged_predictors_are_refused(tmp_path: Path, data: bytes) -> None:
    write_predictors(tmp_path, 1, "layers").write_bytes(data)
    with pytest.raises(StoreError, match=r"default\.safetensors is damaged"):
        resolve(store(path=tmp_path), Config())


def test_predictors_without_a_look_ahead_that_is_a_number_are_refused(tmp_path: Path) -> None:
    file = write_predictors(tmp_path, 1, "layers")
    save_file({"layers.0.bias": np.ones(1, np.float32)}, file, metadata={"lookahead": "far"})
    with pytest.raises(StoreError, match="their look-ahead is not a number"):
        resolve(store(path=tmp_path), Config())


@pytest.mark.parametrize("kind", ["auto", "lowrank"])
def test_predictors_that_are_not_there_are_refused_with_the_command_that_makes_them(
    tmp_path: Path, kind: str
) -> None:
    write_predictors(tmp_path, 1, "layers")
    config = Config.load(None, ["model.predictor=foo", f"predictor.kind={kind}"])
    with pytest.raises(ConfigError, match=r"'foo', only default: .*train-predictor --store .* --name foo"):
        resolve(store(path=tmp_path), config)


@pytest.mark.parametrize("name", ["../default", "a/b", "", ".hidden"])
def test_predictors_are_named_by_plain_file_names(tmp_path: Path, name: str) -> None:
    write_predictors(tmp_path, 1, "layers")
    with pytest.raises(UsageError, match="must be a plain file name"):
        resolve(store(path=tmp_path), Config.parse({"model": {"predictor": name}}))


def test_a_dense_model_is_never_given_a_predictor() -> None:
    assert resolve(store(activation="gelu"), Config()).forecast.kind == "all"


@pytest.mark.parametrize(
    ("activation", "predictor", "sentence"),
    [
        ("relu", {"kind": "lowrank"}, "has no predictors named 'default'"),
        ("gelu", {"kind": "oracle"}, "oracle needs a ReLU model"),
        ("relu", {"kind": "oracle", "refine": False}, r"needs predictor\.lookahead 0 or"),
        ("relu", {"kind": "all", "pinned_layers": [4]}, "names layer 4, and the model has 4"),
        ("relu", {"kind": "all", "pinned_layers": [-5]}, "names layer -5"),
    ],
)
def test_what_a_model_cannot_do_is_refused(
    activation: Activation, predictor: dict[str, object], sentence: str
) -> None:
    with pytest.raises(ConfigError, match=sentence):
        divide.plan(store(activation=activation), Config.parse({"predictor": predictor}))


def test_layers_with_nothing_on_flash_are_pinned_and_have_no_slots() -> None:
    model = store(layers=3)
    few = model.layout.layers[0].unit
    layout = Layout.of([(0, few), (2048, few), (64, few)])
    mixed = Store(model.path, replace(model.manifest, layout=layout))
    plan = divide.plan(mixed, configured(cache={"share": 0.25})).plan
    assert (plan.units, plan.slots, plan.forecast.pinned) == ((0, 2048, 64), (0, 512, 16), {0})
    assert divide.most(mixed, configured()).plan.slots == (0, 2048, 64)


def test_a_plan_reaches_the_workers_as_it_is(tmp_path: Path) -> None:
    write_predictors(tmp_path, 1, "layers", "inlayer")
    plan = divide.plan(store(path=tmp_path), Config.parse({"predictor": {"pinned_layers": [-1]}})).plan
    assert plan.forecast == Forecast("lowrank", 1, refine=True, pinned=frozenset({3}))
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan


def test_the_division_is_told() -> None:
    report = divide.plan(store(), configured(memory={"budget": "2GiB"}))
    assert "of 2.00 GiB" in report.lines[0]
    assert len(report.lines) == 1 + len(report.parts)


def test_the_disk_is_probed_with_what_is_there(tmp_path: Path) -> None:
    model = store(path=tmp_path)
    (tmp_path / BUNDLES).write_bytes(bytes(model.layout.total_bytes))
    assert probe_rate(model) > 1e6


def test_the_readmes_recipe_for_opt_6_7b_has_room_for_a_working_set() -> None:
    """`--config configs/opt-6.7b.toml --memory 50%+1GiB --context 512`, with predictors of 8 % of the FFN."""
    model = store(layers=32, d_model=4096, d_ff=16_384, resident=4_727_043_728)
    file = Path(__file__).parent.parent / "configs" / "opt-6.7b.toml"
    budget = parse_budget("50%+1GiB", model)
    assert budget is not None
    left = budget - round(0.08 * model.layout.total_bytes)
    settings = ["predictor.kind=all", "compute.context=512", "compute.threads=2", f"memory.budget={left}B"]
    divided = divide.plan(model, Config.load(file, settings)).plan
    assert min(divided.slots) > 0.15 * model.layout.most_units


def test_structured_output_takes_memory_where_it_is_wanted_alone() -> None:
    model = store()
    without = divide.plan(model, Config.parse({"memory": {"budget": "2GiB"}}))
    wanted = divide.plan(model, Config.parse({"memory": {"budget": "2GiB"}, "compute": {"structured": True}}))
    part = wanted.parts["structured output"]
    assert part == (16 << 20) + 1024 * model.architecture.vocabulary
    assert "structured output" not in without.parts
    assert wanted.total <= 2 << 30
    least = [
        divide.least(model, Config.parse({"compute": {"structured": one}})).total for one in (False, True)
    ]
    assert least[1] - least[0] == part
