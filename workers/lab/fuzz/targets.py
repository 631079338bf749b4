"""Every decoder, with what it is given and what may come of it: a value, or an error of ours."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFWriter
from hypothesis import strategies as st

from pipeline.config import Config
from pipeline.ring import messages
from pipeline.ring.codec import ProtocolError
from pipeline.serving import client_messages
from pipeline.serving.call_reader import CallReader
from pipeline.serving.calls import FORMS, CallForm
from pipeline.serving.chat import ChatTemplate
from pipeline.serving.openai_api import ChatRequest, CompletionRequest, parse
from storage import neighbours, shadow
from storage.architecture import Activation, Architecture, Attention, Ffn, Layer, Norm
from storage.codecs import CODECS
from storage.dial import DIAL, Dial, DialLayer, DialPoint, Text, Thresholds, read_dial, write_dial
from storage.errors import FlashringError
from storage.families.registry import family_of
from storage.gguf.file import GgufFile
from storage.header import header_bytes
from storage.layout import Layout, neuron
from storage.manifest import BUNDLES, CHECKSUM_BYTES, CHECKSUMS, MANIFEST, RESIDENT, FileEntry, Manifest
from storage.old_tokenizer import read_model
from storage.store import Store
from storage.sums import UnitSums
from storage.tensors import Tensors
from workers.lab.fuzz.inputs import anything, as_json, changed, changed_tree, nested

D_MODEL, UNITS, LAYERS = 64, 8, 2


@dataclass(frozen=True, slots=True)
class Target:
    """One decoder. `decode` returns, or raises an error of ours; anything else is a failure."""

    name: str
    inputs: st.SearchStrategy[Any]
    decode: Callable[[Any], object]

    def check(self, given: Any) -> None:
        try:
            self.decode(given)
        except (FlashringError, ProtocolError) as error:
            if not str(error):
                raise ValueError("an error without a sentence") from error


def targets(directory: Path) -> list[Target]:
    """All of them; files are written below `directory`."""
    return [
        _manifest(directory, "manifest", "float16"),
        _manifest(directory, "low-manifest", "q4"),
        _header(directory),
        _gguf(directory),
        Target("ring-protocol", _frames(messages.encode(messages.Cancel(3)), _generate()), messages.decode),
        Target("serving-protocol", _frames(_submit()), client_messages.decode),
        *_http(),
        _configuration(directory),
        _templates(),
        _calls(),
        _sums(directory),
        _low_bits(),
        _settings(),
        *_tokenizers(directory),
        _dial(directory),
        _shadow(directory),
    ]


def _file(directory: Path, name: str) -> Path:
    """A file of one's own to write, for a decoder that reads files."""
    return Path(tempfile.mkdtemp(dir=directory)) / name


# -- stores ---------------------------------------------------------------------------------------


def architecture(activation: Activation = "relu") -> Architecture:
    norm = Norm(1e-5)
    attention = Attention(heads=2, kv_heads=2, head_dim=D_MODEL // 2, scale=0.1)
    layer = Layer(attention, Ffn("plain", UNITS, 1, activation), {"attention_input": norm, "ffn_input": norm})
    return Architecture(
        family="opt",
        d_model=D_MODEL,
        vocabulary=64,
        max_positions=64,
        layers=(layer,) * LAYERS,
        final_norm=norm,
        tied_head=True,
        embed_dim=D_MODEL,
        learned_positions=2,
        bos_token=None,
        eos_tokens=(),
    )


def _sound_store(path: Path, codec: str = "float16", activation: Activation = "relu") -> Manifest:
    """A store of zeros, written to `path`."""
    layout = Layout.uniform(LAYERS, UNITS, neuron(codec, D_MODEL))
    data = {
        BUNDLES: bytes(layout.total_bytes),
        CHECKSUMS: bytes(layout.total_units * CHECKSUM_BYTES),
        RESIDENT: b"\x02\0\0\0\0\0\0\0{}",
    }
    for name, content in data.items():
        (path / name).write_bytes(content)
    files = {name: FileEntry(len(content), "0" * 32) for name, content in data.items()}
    return Manifest(architecture(activation), layout, "id", "fuzzed", files, {})


def _manifest(directory: Path, name: str, codec: str) -> Target:
    path = _file(directory, MANIFEST)
    sound = _sound_store(path.parent, codec).to_json()
    del sound["xxh3_128"]  # else nothing but the seal is looked at
    text = as_json(sound)

    def decode(given: bytes) -> object:
        path.write_bytes(given)
        return Store.open(path.parent)

    return Target(name, st.one_of(changed_tree(sound).map(as_json), changed(text), nested()), decode)


def _header(directory: Path) -> Target:
    path = _file(directory, RESIDENT)
    wide = [("a", "float32", (2, 3)), ("b", "float16", (4,)), ("c", "q4", (2, 64))]
    head = header_bytes(wide, {"codecs": json.dumps({"c": "q4"})})

    def decode(given: bytes) -> object:
        path.write_bytes(given)
        file = Tensors(path)
        return [file.read(name) for name in file.names]

    return Target("header", _tensors(head + bytes(200)), decode)


def _tensors(sound: bytes, inner: str = "") -> st.SearchStrategy[bytes]:
    """A safetensors file changed anywhere, in its header, or in the JSON of its metadata's `inner`."""
    start = 8 + int.from_bytes(sound[:8], "little")
    head, rest = json.loads(sound[8:start]), sound[start:]

    def whole(text: bytes) -> bytes:
        return len(text).to_bytes(8, "little") + text + rest

    def within(tree: Any) -> bytes:
        return whole(as_json({**head, "__metadata__": {**head["__metadata__"], inner: json.dumps(tree)}}))

    kinds = [changed(sound), changed_tree(head).map(as_json).map(whole), nested().map(whole)]
    if inner:
        kinds.append(changed_tree(json.loads(head["__metadata__"][inner])).map(within))
    return st.one_of(kinds)


def _sums(directory: Path) -> Target:
    path = _file(directory, CHECKSUMS)
    manifest = _sound_store(path.parent)
    store = Store(path.parent, manifest)
    slots = np.zeros((UNITS, store.layout.stride), np.uint8)
    ids = np.arange(UNITS, dtype=np.int32)

    def decode(given: bytes) -> object:
        path.write_bytes(given)
        sums = UnitSums.of(store)
        return sums and sums.wrong(0, ids, ids, slots.reshape(-1).data, slots.shape[1])

    return Target("unit-sums", changed(path.read_bytes()), decode)


def _low_bits() -> Target:
    """Any bytes are a row of four bits; what they widen to is finite where its scales are."""
    names = [name for name, codec in CODECS.items() if codec.grouped is not None]
    rows = st.tuples(st.sampled_from(names), st.binary(min_size=1024, max_size=1024))

    def decode(given: tuple[str, bytes]) -> object:
        codec = CODECS[given[0]]
        size = codec.size(256)
        row = np.frombuffer(given[1][:size], np.uint8).view(codec.carrier).reshape(1, -1)
        with np.errstate(all="ignore"):
            values = codec.widen(row)
        assert values.shape == (1, 256)
        return values

    return Target("low-bits", rows, decode)


def _dial(directory: Path) -> Target:
    path = _file(directory, DIAL)
    store = Store(path.parent, _sound_store(path.parent, activation="gelu"))
    zeros, count = np.zeros(UNITS, np.float32), np.zeros(LAYERS, np.float32)
    point = DialPoint("high", "mean", ("down",), 0.01, 0.0, 0.02, 0.1, 0.2, 0.9, 0.5, 100.0, 100)
    layers = (DialLayer(zeros, zeros, np.zeros(D_MODEL, np.float32)),) * LAYERS
    text, thresholds = Text("fuzzed", 9), {"high": Thresholds(count, count)}
    write_dial(store, Dial({"down": "q4"}, text, text, "high", (point,), layers, thresholds))

    def decode(given: bytes) -> object:
        path.write_bytes(given)
        return read_dial(store)

    return Target("dial", _tensors(path.read_bytes(), "dial"), decode)


def _shadow(directory: Path) -> Target:
    place = _file(directory, BUNDLES).parent
    store = Store(place, _sound_store(place, activation="gelu"))
    path = shadow.write(store, 4)

    def decode(given: bytes) -> object:
        path.write_bytes(given)
        found = shadow.Shadow.open(store)
        memory = [
            np.zeros((found.units(layer), found.unit(layer).stride), np.uint8) for layer in range(LAYERS)
        ]
        return found.bytes, [found.read(layer, one) for layer, one in enumerate(memory)]

    return Target("shadow", _tensors(path.read_bytes(), "codecs"), decode)


# -- checkpoints ----------------------------------------------------------------------------------


def _gguf(directory: Path) -> Target:
    path = _file(directory, "fuzzed.gguf")
    writer = GGUFWriter(str(path), "llama")
    for key, number in (("context_length", 64), ("embedding_length", 32), ("block_count", 1)):
        writer.add_uint32(f"llama.{key}", number)
    writer.add_uint32("llama.feed_forward_length", 64)
    writer.add_uint32("llama.attention.head_count", 2)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("llama-bpe")
    writer.add_token_list(["a", "b", "ab", "<end>"])
    writer.add_token_types([1, 1, 1, 3])
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(3)
    writer.add_chat_template("{{ messages }}")
    writer.add_tensor("token_embd.weight", np.zeros((4, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    def decode(given: bytes) -> object:
        path.write_bytes(given)
        file = GgufFile.open(path, None, keep=True)
        return file.texts(), file.generation(), file.identity(), family_of(file.config)

    return Target("gguf", changed(path.read_bytes()), decode)


def _settings() -> Target:
    """A checkpoint's `config.json`."""
    sound = {
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 99,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "rope_theta": 10000.0,
        "rope_scaling": {"rope_type": "linear", "factor": 2.0},
        "eos_token_id": [1, 2],
        "tie_word_embeddings": False,
    }
    kinds = st.sampled_from(["llama", "opt", "falcon", "qwen3", "gemma3_text", "mixtral", "phi3", "nothing"])
    trees = st.tuples(kinds, changed_tree(sound)).map(
        lambda pair: {**pair[1], "model_type": pair[0]} if isinstance(pair[1], dict) else {}
    )
    return Target("checkpoint-config", trees, lambda tree: family_of(tree).architecture(tree))


def _tokenizers(directory: Path) -> list[Target]:
    model = _file(directory, "tokenizer.model")
    # Two pieces of a sentencepiece model: field 1 (piece) with text, score and type.
    sound = b"\x0a\x0c\x0a\x03<s>\x15\0\0\0\0\x18\x03" + b"\x0a\x0a\x0a\x01a\x15\0\0\0\0\x18\x01"
    beside = _file(directory, "tokenizer_config.json")
    config = {
        "added_tokens_decoder": {"7": {"content": "<x>", "special": True}},
        "bos_token": "<s>",
        "eos_token": {"content": "</s>"},
        "chat_template": [{"name": "default", "template": "x"}],
    }

    def read(given: bytes) -> object:
        model.write_bytes(given)
        return read_model(model)

    def named(given: bytes) -> object:
        beside.write_bytes(given)
        found = neighbours.Named.read(beside.parent)
        return list(found.special()), list(found.usual()), found.numbered()

    texts = st.one_of(changed_tree(config).map(as_json), changed(as_json(config)), nested())
    return [Target("sentencepiece", changed(sound), read), Target("tokenizer-config", texts, named)]


# -- protocols ------------------------------------------------------------------------------------


def _generate() -> bytes:
    return messages.encode(messages.Generate(1, (1, 2), 9, 0.5, 3, 0.9, 7, (1,), ()))


def _submit() -> bytes:
    chat = ({"role": "user", "content": "x"},)
    submit = client_messages.Submit(1, None, (), chat, 5, 0.5, 3, 0.9, 7, ("a",), False, 0.0)
    return client_messages.encode(submit)


def _frames(*sound: bytes) -> st.SearchStrategy[bytes]:
    return st.one_of(*map(changed, sound), st.binary(max_size=64), nested())


def _http() -> list[Target]:
    chat = {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "a"}]},
            {"role": "assistant", "content": None, "tool_calls": []},
        ],
        "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}],
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "x", "schema": {"type": "object"}},
        },
        "max_completion_tokens": 3,
        "stop": ["x"],
        "seed": 1,
    }
    plain = {"prompt": ["a", "b"], "max_tokens": 3, "temperature": 0.5, "logprobs": 1, "stream": True}

    def decode(kind: type[CompletionRequest] | type[ChatRequest]) -> Callable[[bytes], object]:
        def one(body: bytes) -> object:
            wanted = parse(kind, body)
            wanted.check()
            return wanted.submits()

        return one

    def bodies(sound: dict[str, Any]) -> st.SearchStrategy[bytes]:
        return st.one_of(changed_tree(sound).map(as_json), changed(as_json(sound)), nested())

    return [
        Target("http-chat", bodies(chat), decode(ChatRequest)),
        Target("http-completion", bodies(plain), decode(CompletionRequest)),
    ]


# -- what users write -----------------------------------------------------------------------------


def _configuration(directory: Path) -> Target:
    path = _file(directory, "fuzzed.toml")
    sound = (
        b'[predictor]\nkind = "lowrank"\nlookahead = 1\n[cache]\nshare = 0.25\n[storage]\nverify = "off"\n'
    )
    keys = st.sampled_from(
        ["cache.share", "cache.window", "compute.context", "storage.verify", "x.y", "model"]
    )
    values = st.one_of(st.text(max_size=12), anything().map(json.dumps))
    settings = st.lists(st.tuples(keys, values).map(lambda pair: f"{pair[0]}={pair[1]}"), max_size=2)

    def decode(given: tuple[bytes, list[str]]) -> object:
        path.write_bytes(given[0])
        return Config.load(path, given[1])

    return Target("configuration", st.tuples(changed(sound), settings), decode)


TEMPLATES = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}\n{% endfor %}",
    "{%- set ns = namespace(n=0) -%}{% for m in messages %}{% set ns.n = ns.n + 1 %}{{ m['content'][:5] }}"
    "{% endfor %}{{ ns.n * 3 }}",
    "{% macro f(x) %}{{ x ~ 1 }}{% endmacro %}{{ f(messages | length) }}{{ messages | tojson(indent=2) }}",
    "{% generation %}{{ 'a'.ljust(9) }}{% endgeneration %}{{ range(3) | list }}{{ tools is defined }}",
)
WORDS = (
    "{{ ",
    " }}",
    "{% ",
    " %}",
    "for ",
    "in ",
    "messages",
    "[0]",
    ".x",
    "* 9",
    "if ",
    "endfor",
    "'a'",
    "|",
    "(",
)


def _templates() -> Target:
    words = st.lists(st.sampled_from(WORDS), max_size=12).map("".join)
    sound = [changed(text.encode()).map(lambda data: data.decode(errors="replace")) for text in TEMPLATES]
    said = ({"role": "user", "content": "a question"},)

    def decode(source: str) -> object:
        return ChatTemplate(source, {"bos_token": "<s>"}).render(said)

    return Target("chat-template", st.one_of(words, *sound), decode)


def _calls() -> Target:
    """What a model writes where it may call tools, in pieces."""
    parts = (
        "<tool_call>",
        "\n",
        '{"name": "f", ',
        '"arguments": {',
        "}}",
        "</tool_call>",
        "a",
        '"',
        "\\",
        "{",
    )
    pieces = st.lists(st.one_of(st.sampled_from(parts), st.text(max_size=4)), max_size=12)

    def decode(given: tuple[CallForm, list[str]]) -> object:
        reader = CallReader(given[0])
        found = [reader.push(piece) for piece in given[1]]
        return found, reader.finish()

    return Target("tool-calls", st.tuples(st.sampled_from(FORMS), pieces), decode)
