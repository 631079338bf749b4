"""What made the data beside this file: run once, at version 0.1.0, commit f712401.

    PYTHONPATH=.:tests python tests/frozen/make.py

Newer code never runs it again: it is kept to show where the bytes come from, and imports modules as they
were then. Every text here is a safe one: at each of its tokens the choice stays what it is when every logit
moves by MARGIN, a hundred times what another CPU's order of summation does.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import checkpoints
import msgpack
import numpy as np
import xxhash
import zmq
from decoding import LocalDecoder
from fake_session import DyingSession, FastSession, GatedSession
from serving import served

from pipeline import Client, Pipeline, client, client_messages, directories, messages
from pipeline.config import Sampling as Defaults
from storage.convert import NeuronOrder, convert
from storage.errors import UsageError
from storage.format import Store
from workers.compute.blocks import after_ffn, before_ffn
from workers.compute.sampling import Sampling, choose
from workers.compute.token import TokenFfn
from workers.predictor import lowrank
from workers.predictor.scorer import Scorer

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
MARGIN = 3e-3  # in logits
SILENCE_MS = 400  # after which a server has said all that it will
GREEDY = Sampling(0.0, 0, 1.0, 0)

_SIZES = {"vocab_size": 264, "hidden_size": 32, "num_attention_heads": 4, "max_position_embeddings": 64}
_OPT = {"word_embed_proj_dim": 32, "num_hidden_layers": 3, "ffn_dim": 48}
_FALCON = {"num_hidden_layers": 2, "ffn_hidden_size": 64}
checkpoints.VARIANTS["frozen-opt"] = ("opt", {**checkpoints._OPT, **_SIZES, **_OPT})
checkpoints.VARIANTS["frozen-falcon"] = ("falcon", {**checkpoints._FALCON, **_SIZES, **_FALCON})

KINDS: dict[str, list[str]] = {
    "lowrank": ["predictor.kind=lowrank"],
    "oracle": ["predictor.kind=oracle", "predictor.refine=true"],
    "all": ["predictor.kind=all"],
}
PROMPTS = (
    "Once upon a time",
    "The little dog",
    "One day, a boy named Tom",
    "Lily had a red ball.",
    "It was raining, and the cat",
    "There was a big tree in the park.",
    "Mom said,",
    "The sun was warm and",
    "Ben and Mia went to",
    "A bird sat on",
)


# -- whether a choice is a safe one -------------------------------------------------------------


class SparseDecoder(LocalDecoder):
    """The local decoder with the sets of a ring of look-ahead 1; without a scorer, all neurons."""

    def __init__(self, store: Store, scorer: Scorer | None, refines: bool) -> None:
        super().__init__(store)
        self._scorer, self._refines = scorer, refines

    def step(self, token: int) -> np.ndarray:
        self.token.position = self.length
        x = source = self.token.embed(token)
        for index, bundles in enumerate(self.bundles):
            residual, hidden = before_ffn(self.architecture, self.token, index, x, lambda _: None)
            ids = self.ids
            if self._scorer is not None:
                seen = hidden if self._refines else source
                ids = self._scorer.wanted(index, seen, self._refines).astype(np.int32)
            source = hidden
            ffn = TokenFfn(self.token, index, hidden, bundles, np.stack([ids, ids]))
            ffn.add(ids.size)
            ffn.close()
            x = after_ffn(self.architecture, self.token, index, residual, ffn.output)
        self.length += 1
        return self.token.logits(x)

    def confirms(self, prompt: Sequence[int], tokens: Sequence[int], sampling: Sampling) -> bool:
        """Whether these are the tokens, and all of them are safe."""
        logits = self.prefill(prompt)[-1]
        for index, token in enumerate(tokens):
            if not _is_safe(logits, token, sampling, index):
                return False
            logits = self.step(token)
        return True


def _is_safe(logits: np.ndarray, token: int, sampling: Sampling, index: int) -> bool:
    assert choose(logits, sampling, index) == token, "the ring and the local decoder differ"
    if not sampling.temperature:
        second, first = np.sort(logits)[-2:]
        return bool(first - second > MARGIN)
    generator = np.random.default_rng(index)
    shifts = generator.uniform(-MARGIN, MARGIN, (16, logits.size)).astype(np.float32)
    return all(choose(logits + shift, sampling, index) == token for shift in shifts)


def answered(ring: Pipeline, prompt: str | list[int], sampling: Sampling, count: int, **more: Any) -> dict:
    """A ring's answer, as the data has it."""
    answer = ring.generate(
        prompt,
        max_new_tokens=count,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        seed=sampling.seed,
        **more,
    )
    text = answer.read()
    assert answer.done is not None
    return {
        "tokens": answer.tokens,
        "text": text,
        "logprobs": [round(value, 6) for value in answer.logprobs],
        "reason": answer.done.reason,
        "prompt_tokens": answer.done.prompt_tokens,
    }


# -- stores -------------------------------------------------------------------------------------


def make_stores(base: Path) -> None:
    """`opt-fp16` with another order and trained predictors, `falcon-bf16`, and what they compute."""
    generator = np.random.default_rng(3)
    order = np.array([generator.permutation(48) for _ in range(3)], np.int32)
    opt = convert(
        checkpoints.write_checkpoint(base / "opt", "frozen-opt", "float16"),
        HERE / "opt-fp16",
        name="opt-fp16",
        order=NeuronOrder("random", order),
    )
    _train(opt, base)
    falcon = convert(
        checkpoints.write_checkpoint(base / "falcon", "frozen-falcon", "bfloat16"),
        HERE / "falcon-bf16",
        name="falcon-bf16",
        alignment=64,  # less than a disk's sector: such a store is read through the page cache
    )
    scorer = lowrank.load(opt, "default", 1, True, 0.0)
    _facts(opt, {"lowrank": scorer, "oracle": None, "all": None})
    _facts(falcon, {"all": None})


def _train(store: Store, base: Path) -> None:
    """Predictors as `train-predictor` makes them, of both look-aheads and with all their thresholds."""
    text = base / "text.txt"
    text.write_text("\n".join(PROMPTS) * 12, encoding="utf-8")
    options = ["--method", "svd", "--rank", "8", "--tokens", "2048", "--threads", "1"]
    command = [sys.executable, "run.py", "train-predictor", "--store", store.path, "--text", text, *options]
    subprocess.run(command, cwd=ROOT, check=True)


def _facts(store: Store, scorers: dict[str, Scorer | None]) -> None:
    """Beside the store: its contents as read, its logits of a prompt, its rings' tokens."""
    rings = {kind: Pipeline.open(str(store.path), settings=KINDS[kind]) for kind in scorers}
    decoders = {kind: SparseDecoder(store, scorer, True) for kind, scorer in scorers.items()}
    for prompt in _random_prompts():
        found = {kind: answered(ring, prompt, GREEDY, 24, ignore_eos=True) for kind, ring in rings.items()}
        distinct = "lowrank" not in found or found["lowrank"]["tokens"] != found["all"]["tokens"]
        if distinct and all(decoders[kind].confirms(prompt, found[kind]["tokens"], GREEDY) for kind in found):
            break
    for ring in rings.values():
        ring.close()
    with LocalDecoder(store) as decoder:
        logits = np.stack([decoder.prefill(prompt), decoder.steps(prompt)])
    np.save(HERE / f"{store.path.name}.npy", logits)
    for decoder in decoders.values():
        decoder.close()
    positions = store.positions()
    facts = {
        "prompt": prompt,
        "layers": [
            xxhash.xxh3_64_hexdigest(store.read_layer(layer).tobytes())
            for layer in range(store.layout.layers)
        ],
        "positions": None if positions is None else positions.tolist(),
        "answers": {kind: {"settings": KINDS[kind], **answer} for kind, answer in found.items()},
    }
    _write(f"{store.path.name}.json", facts)


def _random_prompts() -> Iterator[list[int]]:
    generator = np.random.default_rng(7)
    while True:
        yield [2, *generator.integers(4, 260, 9).tolist()]


# -- the built-in model's texts -----------------------------------------------------------------


def make_texts() -> None:
    """Two greedy and two sampled texts of every kind, all of them safe."""
    rings = {kind: Pipeline.open(settings=settings) for kind, settings in KINDS.items()}
    store = Store.open(next((directories.home() / "stores").glob("builtin-*/manifest.json")).parent)
    scorers = {"lowrank": lowrank.load(store, "default", 1, False, -0.5), "oracle": None, "all": None}
    decoders = {kind: SparseDecoder(store, scorer, False) for kind, scorer in scorers.items()}
    texts: list[dict[str, Any]] = []
    for temperature, top_p in ((0.0, 1.0), (0.8, 0.9)):
        wanted = len(texts) + 2
        for seed, prompt in enumerate(PROMPTS):
            sampling = Sampling(temperature, 0, top_p, seed if temperature else 0)
            found = {kind: answered(ring, prompt, sampling, 60) for kind, ring in rings.items()}
            ids = rings["all"]._ring.session.encode(prompt)
            if all(decoders[kind].confirms(ids, found[kind]["tokens"], sampling) for kind in found):
                chosen = {"temperature": temperature, "top_p": top_p, "seed": sampling.seed}
                texts.append({"prompt": prompt, "sampling": chosen, "answers": found})
            if len(texts) == wanted:
                break
        assert len(texts) == wanted, "too few safe texts"
    for ring in rings.values():
        ring.close()
    for decoder in decoders.values():
        decoder.close()
    _write("texts.json", {"settings": KINDS, "texts": texts})


# -- messages -----------------------------------------------------------------------------------

RING = (
    messages.WorkerReady("prefetcher", 4321, 1, ("reads through io_uring", "größer als 127 Bytes")),
    messages.RingReady(),
    messages.Stop(),
    messages.Failed("cache", "the store is gone"),
    messages.Generate(3, (2, 17, 4095), 60, 0.8, 40, 0.9, 2**62, (2,), ()),
    messages.Generate(4, (2, 17), 2, 0.0, 0, 1.0, 0, (), (5, 6), 1),
    messages.Cancel(3),
    messages.HiddenReady(3, 12, messages.EMBEDDING, 1, False, 95),
    messages.HiddenReady(3, 11, 7, 32, True, -1),
    messages.NeuronsPredicted(3, 12, 0, 311, 0, False, False, 95),
    messages.NeuronsPredicted(3, 11, 7, messages.EVERY, 900, False, True, 40),
    messages.ReadBundles(3, 12, 0, 1, 0, 97, False, True),
    messages.LayerPart(3, 12, 0, 0, (214, 60, 37), (False, False, True), False),
    messages.LayerPart(3, 12, 0, 2, (), (), False),
    messages.PartDone(3, 12, 0, 2),
    messages.TokenReady(3, 0, 1234, -0.6931471805599453),
    messages.Finished(3, "length", 0.25, 1.5),
    messages.ReportStats(9),
    messages.Stats(9, "cache", {"decode_hits": 30.0, "decode_misses": 10.0}),
)
CLIENT = (
    client_messages.Hello(1, "example"),
    client_messages.Welcome(1, "flashring 0.1.0", "builtin", 1280, 1.0, 1048576, False),
    client_messages.Submit(7, "Es war einmal ein Bär", (), (), 50, 0.8, 40, 0.9, 1, ("\n", "."), True, 30.0),
    client_messages.Submit(8, None, (2, 17, 4095), (), None, None, None, None, 0, (), False, 0.0),
    client_messages.Submit(
        9, None, (), ({"role": "user", "content": "Hi"},), 5, 0.0, 0, 1.0, 2**62, (), False, 0.0
    ),
    client_messages.Cancel(7),
    client_messages.Waiting(7, 2),
    client_messages.Token(7, 0, 1234, " Bär", -0.6931471805599453),
    client_messages.Token(7, 1, None, " end", 0.0),
    client_messages.Done(7, "stop", 5, 12, 3, 0.125, 0.25, 1.5),
    client_messages.Error(client_messages.NO_REQUEST, "malformed", "not a message of this protocol"),
    client_messages.AskStats(10),
    client_messages.ServerStats(10, {"waiting": 0.0, "cache.decode_hits": 30.0}),
    client_messages.AskHealth(11),
    client_messages.Health(11, "ready", 0),
)


def make_messages() -> None:
    """A message of every tag, of some several: what is nil, empty, large or no ASCII."""

    def entries(kinds: Any, protocol: Any) -> list[dict[str, Any]]:
        return [
            {
                "name": type(message).__name__,
                "fields": json.loads(json.dumps(asdict(message))),
                "frame": protocol.encode(message).hex(),
            }
            for message in kinds
        ]

    for kinds, base in ((RING, messages.Message), (CLIENT, client_messages.ClientMessage)):
        tags = {kind.TAG for kind in base.__subclasses__() if "__slots__" in vars(kind)}
        assert {message.TAG for message in kinds} == tags
    found = {"ring": entries(RING, messages), "client": entries(CLIENT, client_messages)}
    _write("messages.json", found)


# -- conversations ------------------------------------------------------------------------------

SESSIONS = {"fast": FastSession, "gated": GatedSession, "dying": DyingSession}


def make_conversations(base: Path) -> None:
    """What clients sent, and all that the server answered to each frame."""
    encode = client_messages.encode
    raw = [
        ("AskHealth needs no Hello", encode(client_messages.AskHealth(1))),
        ("a request before Hello", encode(_submit(1, "too early"))),
        ("Hello of another version", encode(client_messages.Hello(7, "raw"))),
        ("Hello", encode(client_messages.Hello(1, "raw"))),
        ("a prompt", encode(_submit(1, "Once"))),
        ("the number again, token ids", encode(_submit(1, None, tokens=(65, 66)))),
        ("chat", encode(_submit(2, None, messages=({"role": "user", "content": "Hi"},)))),
        (
            "what is left out",
            _packed([10, 3, "x", [], [], *[None] * 4, 5, [], False, 0.0]),
        ),
        ("temperature and deadline as integers", _packed([10, 4, "y", [], [], 2, 1, 3, 1, 9, [], True, 20])),
        ("a stop string", encode(_submit(5, "Once", count=9, stop=("w4", "w5", "w3")))),
        ("a wrong temperature", encode(_submit(6, "Once", temperature=-1.0))),
        ("prompt and tokens", encode(_submit(7, "Once", tokens=(1,)))),
        ("neither", encode(_submit(8, None))),
        ("a wrong role", encode(_submit(9, None, messages=({"role": "nobody", "content": "Hi"},)))),
        ("cancelling what is not open", encode(client_messages.Cancel(77))),
        ("AskStats", encode(client_messages.AskStats(12))),
        ("no msgpack", b"\xc1"),
        ("an unknown tag", _packed([99, 1])),
        ("a field too few", _packed([11])),
        ("a message of the server's", encode(client_messages.Health(1, "ready", 0))),
        ("still there", encode(client_messages.AskHealth(13))),
    ]
    cancelled = [
        ("Hello", encode(client_messages.Hello(1, "raw"))),
        ("one token comes, then none", encode(_submit(1, "Once", count=50))),
        ("busy", encode(client_messages.AskHealth(2))),
        ("the number is open", encode(_submit(1, "Twice"))),
        ("Cancel", encode(client_messages.Cancel(1))),
        ("a deadline", encode(_submit(3, "Once", deadline=0.05))),
    ]
    dying = [
        ("Hello", encode(client_messages.Hello(1, "raw"))),
        ("the ring dies before the third token", encode(_submit(1, "Once"))),
    ]
    found = [
        _recorded(base, "frames by hand", "fast", raw),
        _recorded(base, "pipeline.Client", "fast", _of_client(base)),
        _recorded(base, "a cancelled request", "gated", cancelled),
        _recorded(base, "a ring that dies", "dying", dying),
    ]
    _write("conversations.json", found)


def _submit(request: int, prompt: str | None, count: int = 3, temperature: float = 0.5, **more: Any) -> Any:
    given = {"tokens": (), "messages": (), "stop": (), "deadline": 0.0, **more}
    return client_messages.Submit(
        request=request,
        prompt=prompt,
        max_new_tokens=count,
        temperature=temperature,
        top_k=4,
        top_p=0.9,
        seed=3,
        ignore_eos=False,
        **given,
    )


def _packed(array: list[Any]) -> bytes:
    return msgpack.packb(array)


def _of_client(base: Path) -> list[tuple[str, bytes]]:
    """The frames that `pipeline.Client` sends, taken as it makes them."""
    sent: list[tuple[str, bytes]] = []
    original = client._frame

    def noting(message: Any, welcome: Any) -> bytes:
        frame = original(message, welcome)
        sent.append((type(message).__name__, frame))
        return frame

    client._frame = noting
    try:
        with _serving(base, "fast") as server, Client(server.endpoint) as talking:
            talking.health()
            talking.generate("Once upon a time", max_new_tokens=4).read()
            given = {"temperature": 1, "top_k": 5, "top_p": 1, "seed": 8, "stop": "zz", "deadline": 60}
            talking.generate([65, 66, 67], max_new_tokens=3, **given).read()
            talking.chat([{"role": "user", "content": "Hi"}], max_new_tokens=2, ignore_eos=True).read()
            with suppress(UsageError):
                talking.generate("Once", top_p=2.0).read()
            talking.stats()
    finally:
        client._frame = original
    return sent


def _serving(base: Path, session: str) -> Any:
    def open_session() -> Any:
        opened = SESSIONS[session]()
        if session == "gated":
            opened.let(1)
        return opened

    defaults = Defaults(temperature=0.7, top_k=6, top_p=0.95, max_new_tokens=4)
    return served(base, open_session, defaults=defaults, heartbeat=60.0)


def _recorded(base: Path, name: str, session: str, frames: list[tuple[str, bytes]]) -> dict[str, Any]:
    steps = []
    with _serving(base, session) as server:
        context = zmq.Context()
        socket = context.socket(zmq.DEALER)
        socket.linger = 0
        socket.connect(server.endpoint)
        for what, frame in frames:
            socket.send(frame)
            replies = []
            while socket.poll(SILENCE_MS):
                replies.append(socket.recv().hex())
            steps.append({"what": what, "sent": frame.hex(), "replies": replies})
        socket.close()
        context.term()
    return {"name": name, "session": session, "steps": steps}


def _write(name: str, data: Any) -> None:
    text = json.dumps(data, ensure_ascii=False, indent=1)
    (HERE / name).write_text(text + "\n", encoding="utf-8")


def main() -> None:
    for store in ("opt-fp16", "falcon-bf16"):
        shutil.rmtree(HERE / store, ignore_errors=True)
    with tempfile.TemporaryDirectory() as base:
        make_messages()
        make_conversations(Path(base))
        make_stores(Path(base))
        make_texts()


if __name__ == "__main__":
    main()
