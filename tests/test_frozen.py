"""What version 0.1.0 wrote and said still works: stores, predictors, texts, messages and clients.

`frozen/README.md` tells what the data is. It is never made again: where a test here fails, the code is wrong,
or the change needs another version of the format or of the protocol.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
import xxhash
import zmq
from decoding import LocalDecoder
from fake_session import DyingSession, FastSession, GatedSession
from serving import served

from pipeline import Pipeline
from pipeline.config import Decoding
from pipeline.ring import messages
from pipeline.serving import client_messages
from storage.store import Store

ROOT = Path(__file__).resolve().parent.parent
FROZEN = ROOT / "tests" / "frozen"

# Ring messages that are no longer those of version 0.1.0, each with the reason. The ring's protocol is spoken
# within one version only, so they may change; PROTOCOL_VERSION then does, too.
CHANGED: dict[str, str] = {
    "Failed": "tells an impossible configuration, and a damaged store, from a failure",
    "Finished": "tells why an answer of a given form cannot go on",
    "Generate": "carries the form of its answer",
    "HiddenReady": "carries its Step",
    "NeuronsPredicted": "carries its Step; certain, doubtful and every neuron apart",
    "ReadBundles": "carries its Step",
}

# Other processors sum in another order. That is all that may differ, except that a lowrank set may gain or
# lose a neuron whose score lies within rounding of the threshold.
LOGITS = 1e-5  # of the largest logit
LOGPROBS = {"all": 1e-4, "oracle": 1e-4, "lowrank": 2e-2}


def load(name: str) -> Any:
    return json.loads((FROZEN / name).read_text(encoding="utf-8"))


# -- stores and predictors ----------------------------------------------------------------------

STORES = ("opt-fp16", "falcon-bf16")
RINGS = [(name, kind) for name in STORES for kind in load(f"{name}.json")["answers"]]


def copy(name: str, base: Path) -> Path:
    """The store where code may do with it what it likes."""
    return Path(shutil.copytree(FROZEN / name, base / name))


@pytest.mark.parametrize("name", STORES)
def test_a_store_is_read_as_it_was(name: str, tmp_path: Path) -> None:
    facts = load(f"{name}.json")
    store = Store.open(copy(name, tmp_path))
    found = [
        xxhash.xxh3_64_hexdigest(store.read_layer(index)[:, : layer.unit.bytes].tobytes())
        for index, layer in enumerate(store.layout.layers)
    ]
    assert found == facts["layers"]
    positions = store.positions()
    assert (None if positions is None else [one.tolist() for one in positions]) == facts["positions"]


@pytest.mark.parametrize("name", STORES)
def test_a_store_is_verified(name: str, tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "run.py"), "verify", str(copy(name, tmp_path))]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 0, ended.stderr


@pytest.mark.parametrize("name", STORES)
def test_logits(name: str, tmp_path: Path) -> None:
    by_batch, by_token = np.load(FROZEN / f"{name}.npy")
    prompt = load(f"{name}.json")["prompt"]
    with LocalDecoder(Store.open(copy(name, tmp_path))) as decoder:
        for got, wanted in ((decoder.prefill(prompt), by_batch), (decoder.steps(prompt), by_token)):
            assert np.abs(got - wanted).max() < LOGITS * np.abs(wanted).max()


@pytest.mark.parametrize(("name", "kind"), RINGS)
@pytest.mark.ring
def test_a_ring_on_a_store_answers_as_it_did(name: str, kind: str, tmp_path: Path) -> None:
    facts = load(f"{name}.json")
    wanted = facts["answers"][kind]
    with Pipeline.open(str(copy(name, tmp_path)), settings=wanted["settings"]) as ring:
        check(ring, facts["prompt"], wanted, kind, temperature=0.0, ignore_eos=True)


# -- the built-in model's texts -----------------------------------------------------------------


@pytest.mark.parametrize("kind", load("texts.json")["settings"])
@pytest.mark.ring
def test_the_built_in_model_writes_what_it_wrote(kind: str) -> None:
    data = load("texts.json")
    with Pipeline.open(settings=data["settings"][kind]) as ring:
        for one in data["texts"]:
            check(ring, one["prompt"], one["answers"][kind], kind, **one["sampling"])


def check(ring: Pipeline, prompt: str | list[int], wanted: dict, kind: str, **sampling: Any) -> None:
    answer = ring.generate(prompt, max_new_tokens=len(wanted["tokens"]), **sampling)
    text = answer.read()
    assert answer.tokens == wanted["tokens"]
    assert text == wanted["text"]
    assert answer.logprobs == pytest.approx(wanted["logprobs"], abs=LOGPROBS[kind])
    assert answer.done is not None
    assert (answer.done.reason, answer.done.prompt_tokens) == (wanted["reason"], wanted["prompt_tokens"])


# -- messages -----------------------------------------------------------------------------------


def named(protocol: str) -> list[Any]:
    return [pytest.param(one, id=one["name"]) for one in load("messages.json")[protocol]]


def is_as_it_was(frozen: dict, protocol: Any) -> bool:
    """Whether the frame is still read as these fields, and they are still written as this frame."""
    frame = bytes.fromhex(frozen["frame"])
    try:
        message = protocol.decode(frame)
    except messages.ProtocolError:
        return False
    fields = json.loads(json.dumps(asdict(message)))  # tuples as lists
    return (type(message).__name__, fields, protocol.encode(message)) == (
        frozen["name"],
        frozen["fields"],
        frame,
    )


@pytest.mark.parametrize("frozen", named("client"))
def test_a_message_of_clients_and_servers_is_as_it_was(frozen: dict) -> None:
    assert is_as_it_was(frozen, client_messages)
    assert client_messages.CLIENT_PROTOCOL_VERSION == 1


@pytest.mark.parametrize("frozen", named("ring"))
def test_a_message_of_the_ring_is_as_it_was_or_named_as_changed(frozen: dict) -> None:
    assert is_as_it_was(frozen, messages) or frozen["name"] in CHANGED


def test_what_is_named_as_changed_has_changed() -> None:
    ring = load("messages.json")["ring"]
    assert {one["name"] for one in ring if not is_as_it_was(one, messages)} == CHANGED.keys()
    assert messages.PROTOCOL_VERSION > 1 or not CHANGED


# -- conversations ------------------------------------------------------------------------------

WELCOME, DONE, ERROR, SERVER_STATS = 2, 14, 15, 21


def gated() -> GatedSession:
    """It gives one token, and the next when the request is cancelled."""
    session = GatedSession()
    session.let(1)
    return session


SESSIONS = {"fast": FastSession, "gated": gated, "dying": DyingSession}


@pytest.mark.parametrize("conversation", load("conversations.json"), ids=lambda one: one["name"])
def test_a_client_is_answered_as_it_was(conversation: dict, tmp_path: Path) -> None:
    defaults = Decoding(temperature=0.7, top_k=6, top_p=0.95, max_new_tokens=4)
    open_session = SESSIONS[conversation["session"]]
    # No heartbeat comes in between.
    with (
        served(tmp_path, open_session, defaults=defaults, heartbeat=60.0) as server,
        zmq.Context() as context,
        context.socket(zmq.DEALER) as socket,
    ):
        socket.linger = 0
        socket.connect(server.endpoint)
        for step in conversation["steps"]:
            socket.send(bytes.fromhex(step["sent"]))
            for reply in step["replies"]:
                assert socket.poll(20_000), f"{step['what']}: no answer"
                wanted, got = msgpack.unpackb(bytes.fromhex(reply)), msgpack.unpackb(socket.recv())
                assert comparable(got, wanted) == comparable(wanted, wanted), step["what"]
        assert not socket.poll(100), "more answers than there were"


def comparable(reply: list[Any], wanted: list[Any]) -> list[Any]:
    """The reply without what may differ: the server's version, measured times, sentences, new counters."""
    tag, *fields = reply
    if tag == WELCOME:
        fields[1] = fields[1].split()[0]
    elif tag == DONE:
        fields[5:] = [type(seconds) for seconds in fields[5:]]
    elif tag == ERROR:
        fields[2] = bool(fields[2])
    elif tag == SERVER_STATS:
        fields[1] = {name: value for name, value in fields[1].items() if name in wanted[2]}
    return [tag, *fields]
