"""The two devices: one model, one loop, the same text."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from checkpoints import DTYPES, VARIANTS, write_checkpoint
from decoding import LocalDecoder

from storage.codecs import CODECS
from storage.convert import convert
from storage.store import Store
from workers.compute import blocks
from workers.compute.cpu.device import CpuDevice
from workers.compute.device import Device
from workers.compute.torch.device import TorchDevice
from workers.compute.weights import Weights

PROMPT = [2, *(5 + (17 * i) % 250 for i in range(20))]
TOLERANCE = 1e-4  # of logits whose standard deviation is about 1


def made(directory: Path, variant: str, dtype: str = "float32") -> Store:
    return convert(write_checkpoint(directory / "model", variant, dtype), directory / "store", name=variant)


@pytest.mark.parametrize("variant", VARIANTS)
def test_torch_computes_the_model_that_the_kernels_compute(tmp_path: Path, variant: str) -> None:
    """A prompt at once, and token by token behind a part of it."""
    store = made(tmp_path, variant)
    with (
        LocalDecoder(store) as cpu,
        LocalDecoder(store, device=TorchDevice(Weights(store), 128)) as torch,
    ):
        expected = cpu.prefill(PROMPT)
        assert expected.std() > 0.5
        assert np.abs(torch.prefill(PROMPT) - expected).max() < TOLERANCE
        torch.prefill(PROMPT[:7])
        rest = np.stack([torch.step(token) for token in PROMPT[7:]])
        assert np.abs(rest - expected[7:]).max() < TOLERANCE


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_block_in_one_launch_is_that_of_its_parts(tmp_path: Path, variant: str, threads: int) -> None:
    """Bit for bit: norms, attention, the sum and a router's choice, whatever the number of threads."""
    store = made(tmp_path, variant)
    devices = [CpuDevice(Weights(store), 32, count) for count in (1, threads)]
    x = np.random.default_rng(5).normal(size=(4, 1, store.architecture.d_model)).astype(np.float32)
    for position, row in enumerate(x):
        for index, layer in enumerate(store.architecture.layers):
            if not layer.plain:
                continue
            for device in devices:
                device.begin(position, 1, every=False)
            alone, launched = devices
            parts, once = blocks.onward(layer, alone, index, row), launched.onward(index, row)
            assert [one.tobytes() for one in once] == [one.tobytes() for one in parts]
            if layer.ffn.router is not None:
                assert launched.route(index, once[1]).tolist() == alone.route(index, parts[1]).tolist()
    for device in devices:
        device.close()


@pytest.mark.parametrize("dtype", DTYPES)
def test_torch_reads_every_codec_and_keeps_keys_in_it(tmp_path: Path, dtype: str) -> None:
    store = made(tmp_path, "falcon-40b", dtype)
    weights, codec = Weights(store), CODECS[dtype]
    with (
        LocalDecoder(store, device=CpuDevice(weights, 128, 1, codec)) as cpu,
        LocalDecoder(store, device=TorchDevice(weights, 128, codec)) as torch,
    ):
        for decoder in (cpu, torch):
            decoder.prefill(PROMPT[:7])
        found = [np.stack([decoder.step(token) for token in PROMPT[7:]]) for decoder in (cpu, torch)]
    # Where a key falls between two numbers of 16 bits, the devices may round it to different ones.
    assert np.abs(found[0] - found[1]).max() < (TOLERANCE if dtype == "float32" else 0.05)


@pytest.mark.parametrize("how", ["cpu", "torch"])
def test_a_set_does_not_depend_on_its_parts_or_slots(tmp_path: Path, how: str) -> None:
    store = made(tmp_path, "opt")
    weights = Weights(store)
    device: Device = CpuDevice(weights, 16, 1) if how == "cpu" else TorchDevice(weights, 16)
    rng = np.random.default_rng(3)
    units = store.read_layer(0)
    ids = np.sort(rng.choice(len(units), len(units) // 3, replace=False)).astype(np.int32)
    x = rng.standard_normal((1, store.architecture.d_model), np.float32)
    results = set()
    for cuts in ([], [5], [1, 4, 30]):
        slots = rng.permutation(len(units)).astype(np.int32)  # of every unit
        memory = np.empty_like(units)
        memory[slots] = units
        device.begin(0, 1, every=False)
        ffn = device.ffn(0, x if how == "cpu" else _tensor(x))
        parts = np.split(rng.permutation(ids), cuts)
        for part in parts:
            ffn.add(part, slots[part], memory)
        ffn.close()
        results.add(device.host(ffn.finish()).tobytes())
    device.close()
    assert len(results) == 1


def _tensor(x: np.ndarray) -> object:
    import torch

    return torch.from_numpy(x)
