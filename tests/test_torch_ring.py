"""Rings whose compute is a torch device: the text of the kernels, within memory, whatever lies where."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import write_checkpoint
from ring import PROMPT, Outcome, config, generate, outcome, plan_for
from torch_devices import CUDA, HAS_CUDA

from pipeline.config import Config
from pipeline.planner import devices, divide
from pipeline.ring.generation import GenerationParams
from pipeline.ring.session import Session
from storage.convert import convert
from storage.errors import BudgetError, ConfigError
from storage.store import Store
from workers.lab.bench.cgroup import CgroupUnavailable, MemoryCgroup
from workers.lab.offline.dense import DenseModel

ROOT = Path(__file__).resolve().parent.parent
COUNT = 24
CLOSE = 1e-3  # between the logarithms of two likelihoods
KINDS = ["torch-cpu", CUDA]
CASES: dict[str, tuple[str, int | None, dict[str, Any]]] = {
    "opt, a predicted set": ("opt", None, {}),
    "falcon, every neuron": ("falcon-7b", 8, {"predictor": {"kind": "all"}}),
    "gated, four bits": ("gemma2", 4, {"predictor": {"kind": "all"}}),
    "experts": ("qwen3-moe", 4, {"predictor": {"kind": "router"}}),
}


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Store]:
    made = {}
    for variant, bits, _ in CASES.values():
        base = tmp_path_factory.mktemp("torch-ring")
        checkpoint = write_checkpoint(base / "model", variant, "bfloat16")
        made[variant] = convert(checkpoint, base / "store", name=variant, bits=bits)
    return made


def on(kind: str, changes: dict[str, Any], **compute: Any) -> Config:
    return config(**{**changes, "compute": {"threads": 1, "context": 128, "device": kind, **compute}})


def device_memory(store: Store, chosen: Config, share: float) -> str:
    """Room for a share of the slots beside all else."""
    report = divide.plan(store, chosen)
    held = sum(size for name, size in report.device.items() if name != "mirror")
    return f"{held + int(share * report.plan.total_slots) * report.plan.stride}B"


@pytest.mark.ring
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", CASES)
def test_the_text_is_the_kernels(stores: dict[str, Store], case: str, kind: str) -> None:
    """Token by token behind the same ones, but for near-ties; and bit for bit whatever the mirror holds."""
    variant, _, changes = CASES[case]
    store = stores[variant]
    chosen = on("cpu", changes)
    with Session(store, chosen, plan_for(store, chosen)) as session:
        expected = generate(session, COUNT)
    forced = tuple(expected.tokens)
    found: list[Outcome] = []
    for share in (0.0, 0.5):
        chosen = on(kind, changes)
        chosen = on(kind, changes, device_memory=device_memory(store, chosen, share))
        plan = plan_for(store, chosen)
        assert plan.mirrored == int(share * plan.total_slots)
        with Session(store, chosen, plan) as session:
            found.append(generate(session, COUNT, forced=forced))
            if share:
                cancelled = session.pieces(PROMPT, GenerationParams(COUNT, ignore_eos=True))
                next(cancelled)
                cancelled.close()
                own = generate(session, COUNT)
                assert own == generate(session, COUNT)
                assert session.last is not None
                assert session.last.delta("compute", "decode_bus_bytes") > 0
    assert found[0] == found[1]
    apart = np.abs(np.subtract(found[0].logprobs, expected.logprobs))
    assert apart.max() < (CLOSE if variant == "opt" else 0.05)  # one token's kernels round its vectors
    assert apart.max() > 0, "these are not two devices"
    same = np.argmin([*np.equal(own.tokens, expected.tokens), False])  # tokens before the first other one
    print(f"{case} on {kind}: {same} of {COUNT} tokens are the same, the rest behind a near-tie")
    if same < COUNT:
        assert abs(own.logprobs[same] - expected.logprobs[same]) < 0.05


EXACT = {"predictor": {"kind": "auto", "refine": None, "quality": "exact"}}


@pytest.mark.ring
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", CASES)
def test_exact_is_the_dense_model(stores: dict[str, Store], case: str, kind: str) -> None:
    """Of what one process computes that has everything at hand, by torch as well."""
    store = stores[CASES[case][0]]
    chosen = on(kind, EXACT)
    plan = plan_for(store, chosen)
    assert plan.forecast.kind == ("router" if store.architecture.mixture else "all")
    with Session(store, chosen, plan) as session:
        found = generate(session, COUNT)
    with DenseModel(store, 1) as dense:
        logits = dense.forward([[*PROMPT, *found.tokens]])[0, len(PROMPT) - 1 : -1]
    logprobs = torch.log_softmax(logits.double(), -1)[torch.arange(COUNT), torch.tensor(found.tokens)]
    assert np.abs(logprobs.numpy() - found.logprobs).max() < 1e-4
    assert (logits.max(-1).values - logits[torch.arange(COUNT), torch.tensor(found.tokens)]).max() < CLOSE


WAYS: dict[str, list[dict[str, Any]]] = {
    "opt": [
        {"cache": {"share": 1.0}},
        {"cache": {"slots_per_layer": 8, "share": None}, "prefetcher": {"staging": 1}},
        {"predictor": {"lookahead": 0}, "cache": {"keep": False}},
    ],
    "qwen3-moe": [
        {"predictor": {"kind": "router"}, "cache": {"share": 1.0}},
        {"predictor": {"kind": "router", "guesses": 0}, "prefetcher": {"max_read": 4096}},
        {"predictor": {"kind": "router", "guesses": 8, "lookahead": 2}, "cache": {"hits_first": False}},
    ],
}


@pytest.mark.ring
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("variant", WAYS)
def test_the_text_does_not_depend_on_what_is_resident(
    stores: dict[str, Store], variant: str, kind: str
) -> None:
    """All in slots, nearly nothing, other guesses: bit for bit."""
    store = stores[variant]
    found = [outcome(store, on(kind, changes)) for changes in WAYS[variant]]
    assert len(found[0].tokens) == COUNT
    assert found[1:] == found[:1] * (len(found) - 1)


def test_drafts_are_the_kernels_alone(stores: dict[str, Store]) -> None:
    """A row's bits may hang on how many rows there are: a draft could change the text."""
    every = {"predictor": {"kind": "all"}}
    assert divide.plan(stores["falcon-7b"], on("cpu", every)).plan.drafts > 0
    assert divide.plan(stores["falcon-7b"], on("torch-cpu", every)).plan.drafts == 0
    with pytest.raises(ConfigError, match=r"needs compute\.device cpu, and it is torch-cpu"):
        divide.plan(stores["falcon-7b"], on("torch-cpu", {**every, "drafts": {"kind": "lookup"}}))


@pytest.mark.ring
@pytest.mark.parametrize(
    ("variant", "share"), [("opt", 0.0), ("opt", 1.0), ("gemma2", 0.5), ("qwen3-moe", 0.0)]
)
def test_a_run_by_torch_stays_within_its_budget(stores: dict[str, Store], variant: str, share: float) -> None:
    """The least that there is, with a mirror of some slots; torch itself is in it."""
    store = stores[variant]
    chosen = Config.parse({"compute": {"device": "torch-cpu"}})
    least = divide.least(store, chosen)
    assert least.parts["processes"] > 600 << 20
    mirror = int(share * least.plan.total_slots) * least.plan.stride
    budget = least.total + mirror + (1 << 20)
    try:
        group = MemoryCgroup(budget)
    except CgroupUnavailable as reason:
        pytest.skip(str(reason))
    line = [sys.executable, str(ROOT / "run.py"), "--model", str(store.path), "--prompt", "Once upon"]
    line += ["--device", "torch-cpu", "--device-memory", f"{sum(least.device.values()) + mirror}B"]
    line += ["--memory", f"{budget}B", "--json", "--ignore-eos", "--max-new-tokens", "20"]
    with group:
        done = subprocess.run(group.command(line), capture_output=True, text=True, check=False)
        peak = group.peak_bytes
    assert done.returncode == 0, done.stderr
    assert 0 < json.loads(done.stdout)["memory"]["peak_bytes"] <= budget
    assert peak is None or peak <= budget
    print(f"{variant}, mirror {mirror}: {peak} of {budget} bytes")


@pytest.mark.parametrize("room", [1 << 20, 64 << 20, 1 << 30])
def test_a_budget_covers_the_mirror_too(stores: dict[str, Store], room: int) -> None:
    """On torch-cpu the device's memory is a part of the budget."""
    store = stores["opt"]
    chosen = on("torch-cpu", {"cache": {}})
    least = divide.least(store, chosen)
    device = sum(least.device.values())
    for extra in (0, store.layout.total_bytes // 2, store.layout.total_bytes):
        budget = least.total + room
        memory = {"budget": f"{budget}B"}
        report = divide.plan(
            store, chosen.replace(memory=memory, compute={"device_memory": f"{device + extra}B"})
        )
        assert report.total <= budget
        assert sum(report.device.values()) <= device + extra
        assert report.parts["mirror"] == report.plan.mirrored * report.plan.stride
        assert report.plan.mirrored <= report.plan.total_slots
        assert f"{report.plan.mirrored:,} slots lie there" in "\n".join(report.lines)
        assert (report.bus_bytes == 0) == (report.plan.mirrored == sum(report.plan.units))
    with pytest.raises(BudgetError, match=r"a device memory of .* the least that would do is \d+MiB"):
        divide.plan(store, chosen.replace(compute={"device_memory": f"{device - (2 << 20)}B"}))


def test_resident_weights_of_a_gpu_are_not_in_host_memory(
    stores: dict[str, Store], monkeypatch: pytest.MonkeyPatch
) -> None:
    store, total = stores["opt"], 1 << 30
    monkeypatch.setattr(devices, "probe", lambda kind: devices.Found("a GPU", total, 2 * total))
    report = divide.plan(store, on("cuda", {}))
    assert report.device["resident weights"] > 0
    assert not {"resident weights", "KV cache", "mirror"} & report.parts.keys()
    assert report.plan.device_bytes == int(0.9 * total)
    assert report.plan.mirrored == report.plan.total_slots
    assert replace(report.plan, mirrored=0) != report.plan
    with pytest.raises(BudgetError, match=r"more than the 1\.00 GiB that a GPU has free"):
        divide.plan(store, on("cuda", {}, device_memory="3GiB"))


@pytest.mark.skipif(HAS_CUDA, reason="here is a CUDA device")
def test_a_device_that_is_not_there_is_one_sentence(stores: dict[str, Store]) -> None:
    store = stores["opt"]
    line = [sys.executable, str(ROOT / "run.py"), "--model", str(store.path), "--prompt", "x"]
    done = subprocess.run([*line, "--device", "cuda"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    (sentence,) = done.stderr.splitlines()
    assert "compute.device is cuda, and torch" in sentence
    assert sentence.endswith("take cpu or torch-cpu")


def test_device_memory_is_for_a_device(stores: dict[str, Store]) -> None:
    with pytest.raises(ConfigError, match=r"for another compute\.device than cpu"):
        divide.plan(stores["opt"], on("cpu", {}, device_memory="1GiB"))
    with pytest.raises(ConfigError, match=r"compute\.device_memory takes a size"):
        divide.plan(stores["opt"], on("torch-cpu", {}, device_memory="some"))
