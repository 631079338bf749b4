"""Units compared with their checksums as they are read: a damaged one names itself, and makes no text."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from checkpoints import write_checkpoint
from damage import flip
from fake_session import FastSession
from ring import config, plan_for
from serving import served

from pipeline import Client
from pipeline.errors import DAMAGED, code_of, from_code
from pipeline.ring.session import Session
from pipeline.serving.client_messages import Submit
from pipeline.serving.warm_ring import WarmRing
from storage.convert import NeuronOrder, convert
from storage.errors import DamagedStore, RingError, StoreCorrupt, StoreError
from storage.manifest import BUNDLES, CHECKSUMS, ORDER, RESIDENT
from storage.predictors import check_sum, install
from storage.repair import repair
from storage.store import Store
from storage.tensors import Tensors
from workers.compute.weights import Vectors, Weights
from workers.prefetcher.verifier import SAMPLE, Verifier


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("verified") / "model", "opt", "float16")


@pytest.fixture(scope="module")
def original(model: Path) -> Path:
    return convert(model, model.parent / "store", name="tiny").path


@pytest.fixture
def store(original: Path, tmp_path: Path) -> Store:
    return Store.open(Path(shutil.copytree(original, tmp_path / "store")))


Memory = npt.NDArray[np.uint8]


def filled(store: Store, layer: int) -> tuple[Memory, npt.NDArray[np.int32], npt.NDArray[np.int32]]:
    """Slots that hold a layer's units, last first; positions and slots."""
    part = store.layout.layers[layer]
    raw = np.fromfile(store.path / BUNDLES, np.uint8, part.bytes, offset=part.start)
    positions = np.arange(part.units, dtype=np.int32)
    memory = np.zeros((part.units, store.layout.stride + 64), np.uint8)  # slots of a larger stride
    memory[::-1, : part.unit.stride] = raw.reshape(part.units, -1)
    return memory, positions, positions[::-1].copy()


@pytest.mark.parametrize(("mode", "note"), [("always", "every unit"), ("sample", f"one unit of {SAMPLE}")])
def test_what_was_written_passes(store: Store, mode: str, note: str) -> None:
    memory, positions, slots = filled(store, 1)
    verifier, said = Verifier.wanted(mode, store, memory)
    assert verifier is not None
    assert said == f"{note} verified"
    for _ in range(3):
        assert verifier.wrong(1, positions, slots)[0].size == 0
    compared = 3 * positions.size if mode == "always" else -(-3 * positions.size // SAMPLE)
    assert verifier.verified == compared
    assert verifier.read_again == 0


def test_a_flipped_bit_is_found_wherever_it_is(store: Store) -> None:
    memory, positions, slots = filled(store, 1)
    verifier, _ = Verifier.wanted("always", store, memory)
    assert verifier is not None
    for byte in (0, 100, store.layout.layers[1].unit.stride - 1):  # the last is padding
        memory[slots[5], byte] ^= 1
        assert [one.tolist() for one in verifier.wrong(1, positions, slots)] == [[5], [int(slots[5])]]
        offset = store.layout.offset(1, 5)
        with pytest.raises(StoreCorrupt, match=f"layer 1, neuron 5, at byte {offset:,}, .*repair"):
            verifier.check(1, positions, slots)
        memory[slots[5], byte] ^= 1
    verifier.check(1, positions, slots)


def test_a_sample_finds_every_unit_sooner_or_later(store: Store) -> None:
    memory, positions, slots = filled(store, 0)
    verifier, _ = Verifier.wanted("sample", store, memory)
    assert verifier is not None
    memory[slots[7], 3] ^= 1
    few = slice(0, 9)  # parts of nine units: the sample falls on another one each time
    found = [verifier.wrong(0, positions[few], slots[few])[0].tolist() for _ in range(SAMPLE)]
    assert found.count([7]) == 1
    assert found.count([]) == SAMPLE - 1


def test_off_and_a_store_without_sums_say_so(store: Store) -> None:
    memory, _, _ = filled(store, 0)
    assert Verifier.wanted("off", store, memory) == (None, "units not verified, as configured")
    del store.manifest.files[CHECKSUMS]
    nothing, said = Verifier.wanted("always", store, memory)
    assert nothing is None
    assert "the store has no checksums" in said


def test_damaged_sums_and_a_damaged_order_are_named(model: Path, tmp_path: Path) -> None:
    units = convert(model, tmp_path / "plain", name="tiny").layout.units
    order = np.array([np.random.default_rng(1).permutation(count) for count in units], np.int32)
    store = convert(model, tmp_path / "store", name="tiny", order=NeuronOrder("random", order))
    memory, _, _ = filled(store, 0)
    for name in (ORDER, CHECKSUMS):
        flip(store.path / name, 9)
        with pytest.raises(StoreCorrupt, match=f"{name} does not match its hash in the manifest"):
            Verifier.wanted("sample", store, memory)


def test_resident_weights_are_compared_with_their_hash(store: Store) -> None:
    Weights(store, verified=True)
    Vectors.of(store, verified=True)
    for offset in (-1, 700):  # in a tensor, in the header's text
        flip(store.path / RESIDENT, offset, bit=0)
        for kind in (Weights, Vectors.of):
            with pytest.raises(
                StoreError, match=r"resident\.safetensors (does not match its hash|is damaged)"
            ):
                kind(store, verified=True)
        flip(store.path / RESIDENT, offset, bit=0)


def test_predictors_are_compared_with_their_hash(store: Store) -> None:
    text = json.dumps(
        {"__metadata__": {"kind": "lowrank"}, "a": {"dtype": "F16", "shape": [4], "data_offsets": [0, 8]}}
    )
    file = store.path.parent / "trained.safetensors"
    file.write_bytes(len(text).to_bytes(8, "little") + text.encode() + bytes(range(8)))
    check_sum(Tensors(file))  # of an earlier version, without a hash
    install(store, "default", file)
    check_sum(Tensors(store.predictors("default")))
    flip(store.predictors("default"), -3)
    with pytest.raises(StoreCorrupt, match=r"does not match its own hash: run\.py train-predictor"):
        check_sum(Tensors(store.predictors("default")))


@pytest.mark.ring
def test_a_damaged_unit_ends_the_run_until_it_is_mended(store: Store, model: Path) -> None:
    """Unit, layer, byte and remedy are told, and no ring starts meanwhile; then all is well."""
    chosen = config(storage={"verify": "always"})
    plan = plan_for(store, chosen)
    flip(store.path / BUNDLES, store.layout.offset(1, 9) + 40)
    said: list[str] = []
    starts: list[Session] = []

    def start() -> Session:
        starts.append(Session(store, chosen, plan))
        return starts[-1]

    submit = Submit(1, None, (2, 17, 40, 9), (), 6, 0.0, None, None, 0, (), True, 0.0)
    ring = WarmRing(start, say=said.append, state=store.state)
    try:
        for _ in range(3):
            with pytest.raises(
                DamagedStore, match=r"layer 1, neuron 9, at byte [\d,]+, does not match"
            ) as found:
                list(ring.answer(submit))
            assert f"`run.py repair {store.path} --from CHECKPOINT` mends it" in str(found.value)
        assert len(starts) == 1
        assert ring.deaths == 0
        assert ring.damage == str(found.value)
        repair(store.path, model)
        assert [type(event).__name__ for event in ring.answer(submit)].count("Token") == 6
        assert not ring.damage
        assert len(starts) == 2
        assert starts[1].ring.stats()["prefetcher"]["verified"] > 0
        assert any("every unit verified" in note for note in starts[1].ring.notes)
        assert "the store has been written to: the ring is started again" in said
    finally:
        ring.close()


class DamagedSession(FastSession):
    """Meets a damaged unit at its third token."""

    def before_token(self, index, cancelled):
        if index == 2:
            raise DamagedStore("the prefetcher worker failed: layer 1, neuron 9: mend it")


def test_a_server_of_a_damaged_store_says_so_and_goes_on(tmp_path: Path) -> None:
    sessions = [DamagedSession(), FastSession()]
    state = [0]
    with served(tmp_path, lambda: sessions.pop(0), state=lambda: state[0], http={}) as server:
        with Client(server.endpoint) as client:
            for _ in range(5):  # more often than a ring may die
                with pytest.raises(DamagedStore, match="layer 1, neuron 9"):
                    client.generate("x", max_new_tokens=4).read()
            assert client.health().status == "damaged"
            state[0] += 1  # somebody repairs it
            assert client.generate("x", max_new_tokens=4).read()
            assert client.health().status in ("ready", "busy")
        assert not server.ask(server.scheduler.failed.done)


def test_damage_travels_to_clients_under_a_name_of_its_own() -> None:
    assert code_of(DamagedStore("x")) == DAMAGED
    assert code_of(RingError("x")) == "ring"
    assert type(from_code(DAMAGED, "x")) is DamagedStore
