"""The configuration: a frozen tree; defaults < file < command line.

The TOML files of `configs/` mirror it. Unknown keys are errors that name the nearest known one.
"""

from __future__ import annotations

import difflib
import json
import os
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pipeline.ring.plan import STEP_ROWS
from pipeline.ring.sampling import Sampling
from storage.errors import ConfigError

# How many of something: at most what every message between processes can carry.
Count = Annotated[int, Field(ge=0, lt=2**31)]

# Which units are compared with their checksums when they have been read: none, one of sixteen, or every one.
Verify = Literal["off", "sample", "always"]

# From the weights as they are to the fastest that a model has: pipeline/quality.py.
Quality = Literal["exact", "high", "balanced", "fast", "small"]

DEVICE = "FLASHRING_DEVICE"  # environment variable: `compute.device` where nothing else says it

Values = Mapping[str, Mapping[str, Any]]  # section → key → value; None says nothing
NOTHING: Values = {}


class Section(BaseModel):
    """Base of the sections: frozen, and closed to unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Model(Section):
    """Where the model comes from."""

    store: str = ""  # directory of a store; empty: converted from the checkpoint into the cache
    checkpoint: str = ""  # Hugging Face id, directory, "builtin" or "builtin-moe"
    # 16, 8 or 4: the store that the checkpoint is converted to. Left out: what the checkpoint has.
    bits: Literal[16, 8, 4] | None = None
    predictor: str = "default"  # which file of the store's predictors/ to use


class Predictor(Section):
    """How the active neurons are foreseen."""

    # A point between exact and fast: decides kind, threshold and full_rows here, and the dials of `experts`.
    quality: Quality | None = None

    # auto: router for a mixture of experts, lowrank for ReLU, else all. shadow: a low-bit copy of every FFN
    # in memory serves all neurons, but for the few whose full rows count most.
    kind: Literal["auto", "lowrank", "oracle", "router", "shadow", "all"] = "auto"
    lookahead: Annotated[int, Field(ge=0, le=8)] = 1  # layers
    # Whether a layer's set is predicted again from its own input; the early prediction is then only a guess,
    # which starts reads. Left out: yes, where the predictors can do it.
    refine: bool | None = None
    pinned_layers: tuple[int, ...] = ()  # resident and computed whole; negative counts from the end
    threshold: Annotated[float, Field(allow_inf_nan=False)] = (
        0.0  # added to what a score must exceed; lower: more neurons
    )
    # Whether a resident neuron is computed at a lower score than an absent one is read at. That saves reads
    # at equal recall, but the text then depends on what is resident.
    cache_aware: bool = False
    # Of a mixture: experts that are read for a layer before its router has chosen, at most; they wait for all
    # reads that somebody waits for. 0: none, also none of kind shadow, which asks for all that it foresees.
    guesses: Annotated[int, Field(ge=0, le=4096)] = 2
    # Whether the first use of a model without zeros makes its shadow and dial, where tokens read from flash.
    calibrate: bool = True
    # Of kind shadow: the share of a layer's neurons whose full rows a token has. 0: nothing is read, not even
    # by a prompt.
    full_rows: Annotated[float, Field(ge=0, le=1)] = 0.1


class Cache(Section):
    """What stays in DRAM."""

    window: Annotated[int, Field(ge=0, le=65536)] = 0  # tokens a neuron stays after its last use; 0: no limit
    half_life: Annotated[float, Field(ge=0)] = 32.0  # tokens until a use counts half; 0: plain LRU
    # Of the FFN in slots, without a memory budget. Left out: all of it where that takes at most 60 % of the
    # memory that the machine has available, else a quarter.
    share: Annotated[float, Field(ge=0, le=1)] | None = None
    slots_per_layer: Count = 0  # overrides share; 0: by share or budget
    # Of a mixture whose needs were recorded (`run.py trace needs`): whether slots go to the layers where they
    # bring most hits. false: every layer has as many.
    by_need: bool = True
    policy: str = "lrfu"  # who leaves first: lrfu by recency and frequency, lru the least recently used
    keep: bool = True  # false: nothing stays for the next token; only comparisons want that
    hits_first: bool = True  # false: what is resident waits for what is read; only comparisons want that


class Prefetcher(Section):
    """How bundles are read."""

    readers: Annotated[int, Field(ge=1, le=64)] = 1  # queues; more cost processor time and bring no bandwidth
    queue_depth: Annotated[int, Field(ge=1, le=4096)] = 128  # reads in flight per queue
    backend: Literal["auto", "io_uring", "threads", "aiofiles"] = (
        "auto"  # auto: io_uring where it is, or threads
    )
    direct: bool = True  # O_DIRECT; false: through the page cache
    # Bytes in flight in all queues: of long reads, more only delay the first of them.
    in_flight: Annotated[int, Field(ge=4096, le=1 << 40)] = 8 << 20
    max_gap: Annotated[int, Field(ge=0, le=1 << 20)] = 0  # bytes read and dropped to join two reads
    max_read: Annotated[int, Field(ge=4096, le=1 << 30)] = 1 << 20  # bytes of one read
    split: bool = False  # in decode, a bundle by two reads, as without bundling; only comparisons want that
    staging: Annotated[int, Field(ge=1, le=1 << 40)] = 16 << 20  # bytes of one staging half


class Storage(Section):
    """How far the store is trusted."""

    verify: Verify = "sample"  # a damaged unit ends the run with its place and what mends it


class Compute(Section):
    """How layers are computed."""

    threads: Count = 0  # at most one a core; 0: as many as there are cores
    context: Count = 0  # tokens of KV cache; 0: 2048 or the model's limit
    kv_cache: Literal["float32", "float16", "bfloat16"] = "float32"  # what keys and values are rounded to
    # Of one token, where weights have eight or four bits: rounded to 15 bits, or slower, as they are.
    activations: Literal["rounded", "exact"] = "rounded"
    # cpu: compiled kernels; torch-cpu, cuda (NVIDIA) and mps (Metal): torch, with the resident weights, the
    # keys and values, and as many slots as `device_memory` allows in the device's memory. Left out: what the
    # environment variable FLASHRING_DEVICE names, else cpu.
    device: Literal["cpu", "torch-cpu", "cuda", "mps"] = Field(
        default_factory=lambda: os.environ.get(DEVICE) or "cpu", validate_default=True
    )
    # Of the device's memory, 7GiB or 50% of the checkpoint. Left out: nearly all that a GPU has free, of
    # torch-cpu the least. On a GPU it comes beside `memory.budget`, on torch-cpu it is a part of that.
    device_memory: str = ""
    audit: Count = 0  # of every Nth token check one layer's set; 0: none
    # Whether memory is kept for answers of a given form (a JSON schema, tools), which are refused without.
    structured: bool = False


class Drafts(Section):
    """Several tokens a step, where every neuron is read anyway. No draft changes the text: docs/drafts.md."""

    # lookup: what followed the last tokens where they stood before; auto: that, where tokens read from flash;
    # model: what a smaller model writes
    kind: Literal["auto", "lookup", "model", "off"] = "auto"
    model: str = ""  # directory of that model's store
    length: Annotated[int, Field(ge=1, le=STEP_ROWS - 1)] = 7  # of one step, at most


class Experts(Section):
    """Lossy dials of a mixture of experts, all off. docs/quality.md says what they cost."""

    per_token: Count = 0  # experts of a token; 0: as many as the model's routers choose
    # What an expert in a slot has above others when a token's are chosen: a share of the distance from the
    # lowest score to the highest. The text then depends on what is resident.
    prefer: Annotated[float, Field(ge=0, le=1)] = 0.0
    # A token goes without an expert that would have to be read, and has less than this share of the weights
    # of its experts. The text then depends on what is resident.
    skip: Annotated[float, Field(ge=0, le=1)] = 0.0


class Decoding(Section):
    """How to decode where the command line, or a request, does not say: how to sample, and how long.

    What is left out here, the model's `generation_config.json` decides (`pipeline/planner/decoding.py`).
    """

    temperature: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0  # 0: always the likeliest token
    top_k: Count = 0  # 0: no limit
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0  # 1: no limit
    max_new_tokens: Annotated[int, Field(ge=1, lt=2**31)] = 200  # of an answer, at most

    def with_seed(self, seed: int) -> Sampling:
        """How to sample, as the ring is told."""
        return Sampling(self.temperature, self.top_k, self.top_p, seed)


class Memory(Section):
    """The budget for everything: weights, caches and the processes themselves."""

    budget: str = ""  # "7GiB", "50%" of the checkpoint, or empty: cache.share decides


class Config(Section):
    """The whole tree."""

    model: Model = Model()
    predictor: Predictor = Predictor()
    cache: Cache = Cache()
    prefetcher: Prefetcher = Prefetcher()
    storage: Storage = Storage()
    compute: Compute = Field(default_factory=Compute)
    drafts: Drafts = Drafts()
    experts: Experts = Experts()
    memory: Memory = Memory()
    sampling: Decoding = Decoding()

    @classmethod
    def load(
        cls,
        file: Path | None,
        settings: Iterable[str] = (),
        preset: Path | None = None,
        values: Values = NOTHING,
    ) -> Config:
        """Read `preset` and `file` (TOML), put `section.key=value` settings over them, and `values` over all.

        Raises ConfigError with one sentence for an unreadable file, an unknown key or a bad value.
        """
        data: dict[str, Any] = {}
        for source in (preset, file):
            if source is not None:
                for section, keys in _read_tree(source).items():
                    data[section] = {**data.get(section, {}), **keys}
        for setting in settings:
            section, key, value = _parse_setting(setting)
            data.setdefault(section, {})[key] = value
        for section, given in values.items():
            said = {key: value for key, value in given.items() if value is not None}
            data[section] = {**data.get(section, {}), **said}
        return cls.parse(data)

    @classmethod
    def parse(cls, data: Mapping[str, Any]) -> Config:
        """Validate a plain tree. Raises ConfigError."""
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise ConfigError(_explain(error)) from error

    def replace(self, **sections: Mapping[str, Any]) -> Config:
        """A copy with some keys of some sections changed, validated again. What nobody set stays so."""
        data = self.model_dump(exclude_unset=True)
        for section, changes in sections.items():
            data[section] = {**data.get(section, {}), **changes}
        return Config.parse(data)

    def changes(self, *sections: str) -> tuple[str, ...]:
        """`section.key=value` of all that is not the default, in these sections."""
        given = self.model_dump(mode="json", include=set(sections), exclude_defaults=True)
        return tuple(
            f"{section}.{key}={json.dumps(value)}"  # as TOML has it, for there is no null among them
            for section, keys in given.items()
            for key, value in keys.items()
        )


def check_verify(word: str) -> str:
    """Of the option `--verify`; empty where it is not given. Raises ConfigError."""
    if word and word not in get_args(Verify):
        raise ConfigError(f"--verify is one of {', '.join(get_args(Verify))}, not {word!r}")
    return word


def _read_tree(file: Path) -> dict[str, dict[str, Any]]:
    """The sections of a TOML file. Raises ConfigError."""
    try:
        tree = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"the configuration {file} cannot be read: {error.strerror}") from error
    except ValueError as error:  # no TOML, no text, or a number of thousands of digits
        raise ConfigError(f"the configuration {file} is not valid TOML: {error}") from error
    for key, value in tree.items():
        if not isinstance(value, dict):
            raise ConfigError(f"the configuration {file} sets {key} outside a section")
    return tree


def _parse_setting(setting: str) -> tuple[str, str, Any]:
    """`section.key=value`; the value is TOML, and failing that a plain string."""
    path, equals, text = setting.partition("=")
    section, dot, key = path.strip().partition(".")
    if not equals or not dot:
        raise ConfigError(f"--set takes section.key=value, not {setting!r}")
    try:
        found = tomllib.loads(f"value = {text}")
    except ValueError:
        found = {}
    return section, key, found["value"] if found.keys() == {"value"} else text


def _known_keys() -> list[str]:
    keys = []
    for name, field in Config.model_fields.items():
        keys.append(name)
        section = field.annotation
        assert section is not None
        keys.extend(f"{name}.{key}" for key in section.model_fields)
    return keys


def _explain(error: ValidationError) -> str:
    """The first problem as one sentence."""
    problem = error.errors()[0]
    where = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        near = difflib.get_close_matches(where, _known_keys(), n=1, cutoff=0.4)
        hint = f"; did you mean {near[0]}?" if near else ""
        return f"unknown configuration key {where}{hint}"
    if where.endswith("device") and problem["input"] == os.environ.get(DEVICE):
        where = f"compute.device by the environment variable {DEVICE}"
    return f"configuration key {where}: {problem['msg']} (got {problem['input']!r:.60})"
