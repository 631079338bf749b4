"""What lies on a torch device: every codec widened there, and slots' units that go over once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import write_checkpoint
from torch_devices import CUDA, HAS_CUDA

from storage.codecs import CODECS, FLOATS
from storage.convert import convert
from storage.layout import Rows, Unit, neuron
from storage.store import Store
from workers.compute.torch import pages
from workers.compute.torch.device import TorchDevice
from workers.compute.torch.shelf import Shelf
from workers.compute.torch.widening import rows_of, stored, widened
from workers.compute.weights import Vectors, Weights
from workers.lab.bench import device_rates

WHERE = ["cpu", CUDA]


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("name", CODECS)
def test_a_codec_is_widened_to_the_bits_that_storage_widens_to(name: str, where: str) -> None:
    codec, device = CODECS[name], torch.device(where)
    values = np.random.default_rng(1).standard_normal((5, 256), np.float32)
    matrix = Rows.of_matrix(codec.narrow(values), codec)
    expected = matrix.widened()
    assert np.array_equal(widened(stored(matrix, device), codec).cpu().numpy(), expected)
    unit = Unit((*neuron(name, 256).rows,), 1, 256)
    memory = np.zeros((5, unit.stride), np.uint8)
    for role in ("up", "down"):
        unit.view(memory, role).values[:] = matrix.values
    found = rows_of(torch.from_numpy(memory).to(device), unit, "down")
    assert np.array_equal(found.cpu().numpy(), expected[:, None])


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("direct", [False, True])
def test_a_mirrored_slot_goes_over_when_its_unit_changes(direct: bool, where: str) -> None:
    """And what has no row of the mirror whenever it is used."""
    shelf = Shelf(torch.device(where), 512, 6, direct)
    memory = np.arange(8 * 512, dtype=np.uint32).astype(np.uint8).reshape(8, 512)
    memory[:, 0] = range(8)

    def bring(ids: list[int], slots: list[int]) -> np.ndarray:
        pieces = shelf.bring(np.array(ids, np.int32), np.array(slots, np.int32), memory)
        here = np.concatenate([piece.ids for piece in pieces])
        return shelf.gather(pieces, np.argsort(here)).cpu().numpy()

    def over() -> float:
        return shelf.counts["decode_bus_bytes"] / 512

    units = memory.copy()
    assert np.array_equal(bring([10, 11, 12], [0, 5, 7]), units[[0, 5, 7]])
    assert over() == 3
    assert np.array_equal(bring([11, 10], [5, 0]), units[[0, 5]])
    assert over() == 3
    memory[5] = 200  # another unit in the slot
    assert np.array_equal(bring([10, 13, 14], [0, 5, 7]), memory[[0, 5, 7]])
    assert over() == 5


@pytest.mark.parametrize("slots", [[3], [2, 3, 4], [0, 1, 5, 7, 6]])
def test_units_that_go_over_from_their_slots_are_those(slots: list[int]) -> None:
    """Neighbours by one copy: of slots in any order, those that are asked for, in that order."""
    memory = np.random.default_rng(5).integers(0, 256, (9, 512), np.uint8)
    ids = np.arange(len(slots), dtype=np.int32)
    (piece,) = Shelf(torch.device("cpu"), 512, 0, True).bring(ids, np.array(slots, np.int32), memory)
    assert np.array_equal(piece.rows.numpy(), memory[slots])


def test_pages_that_cannot_be_locked_are_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    class Refusing:
        def cudaHostRegister(self, address: int, size: int, flags: int) -> int:  # noqa: N802
            raise RuntimeError("CUDA error: operation not supported\nmore lines")

    monkeypatch.setattr(torch.cuda, "cudart", Refusing)
    said = pages.lock(np.zeros(1 << 20, np.uint8))
    assert said.endswith("so copies take longer: CUDA error: operation not supported")
    assert said.startswith("1.00 MiB")


@pytest.mark.parametrize("kind", ["torch-cpu", CUDA])
def test_a_devices_rates_are_those_of_its_memory_its_bus_and_its_products(kind: str) -> None:
    found = device_rates.measure(kind, 1 << 22, 1, 0.01, "float32")
    assert found.keys() == {"read", "matvec", "bus", "matmul", "matmul_float32"}
    assert all(1e6 < rate < 1e16 for rate in found.values())


@pytest.mark.skipif(not HAS_CUDA, reason="no CUDA device")
def test_locked_slots_are_what_cuda_copies_from() -> None:
    memory = np.random.default_rng(6).integers(0, 256, (8, 1 << 20), np.uint8)
    assert pages.lock(memory.reshape(-1)) == ""
    assert torch.from_numpy(memory).is_pinned()
    slots = np.array([6, 1, 2], np.int32)
    shelf = Shelf(torch.device("cuda"), 1 << 20, 4, True)
    for _ in range(3):
        pieces = shelf.bring(np.array([9, 10, 11], np.int32), slots, memory)
        order = np.argsort(np.concatenate([piece.ids for piece in pieces]))
        assert np.array_equal(shelf.gather(pieces, order).cpu().numpy(), memory[slots])
    assert shelf.counts["decode_bus_bytes"] == (3 + 2) << 20  # the sixth is not mirrored


@pytest.fixture(scope="module")
def opt(tmp_path_factory: pytest.TempPathFactory) -> Store:
    base = tmp_path_factory.mktemp("units")
    return convert(write_checkpoint(base / "model", "opt", "float16"), base / "store", name="opt")


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("mirrored", [0, 40, 1000])
def test_a_set_does_not_depend_on_groups_or_on_what_is_mirrored(
    opt: Store, mirrored: int, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks are cut by the order of the set's units alone."""
    monkeypatch.setattr("workers.compute.torch.ffn.WIDENED", 20 * 8 * opt.architecture.d_model)
    units = opt.read_layer(0)
    rng = np.random.default_rng(3)
    ids = np.sort(rng.choice(len(units), 70, replace=False)).astype(np.int32)
    x = torch.from_numpy(rng.standard_normal((1, opt.architecture.d_model), np.float32)).to(where)
    results = set()
    device = TorchDevice(Weights(opt), 16, where=where, mirrored=mirrored)
    for groups in ([], [5], [1, 19, 20, 60]):
        device.begin(0, 1, every=False)
        ffn = device.ffn(0, x)
        for group in np.split(ids, groups):  # as staging brings them: ascending, and given away at once
            for part in np.split(rng.permutation(group), [len(group) // 2]):
                memory = units.copy()
                ffn.add(part, part, memory)
            ffn.close()
            memory[...] = 255
        results.add(device.host(ffn.finish()).tobytes())
    assert len(results) == 1
    assert device.counters()["decode_bus_bytes"] <= 3 * ids.size * opt.layout.stride
    device.close()


@pytest.mark.parametrize("where", WHERE)
def test_weights_that_are_read_one_after_the_other_are_the_same(opt: Store, where: str) -> None:
    outputs = []
    for source in (Weights(opt), Vectors.of(opt)):
        device = TorchDevice(source, 16, where=where)
        device.begin(0, 3, every=True)
        x = device.attention(0, device.norm(0, "attention_input", device.embed(np.array([2, 17, 40]))))
        outputs.append(device.logits(x))
    assert np.array_equal(*outputs)


def test_every_float_has_torchs_name() -> None:
    assert all(isinstance(getattr(torch, name), torch.dtype) for name in FLOATS)


def test_a_store_of_another_order_is_the_same_model(tmp_path: Path, opt: Store) -> None:
    """Ids are the model's, whatever the order on flash."""
    x = torch.ones(1, opt.architecture.d_model)
    device = TorchDevice(Weights(opt), 16)
    device.begin(0, 1, every=True)
    units = opt.read_layer(0)
    order = np.random.default_rng(1).permutation(len(units)).astype(np.int32)
    found = []
    for ids in (np.arange(len(units), dtype=np.int32), order):
        ffn = device.ffn(0, x)
        ffn.add(ids, np.arange(len(units), dtype=np.int32), units[ids])
        ffn.close()
        found.append(device.host(ffn.finish()))
    assert np.array_equal(*found)
