"""The device of a ring, as its plan has it."""

from __future__ import annotations

import torch

from pipeline.ring.plan import Plan
from storage.codecs import Codec
from workers.compute.bound import Source
from workers.compute.device import Bytes
from workers.compute.torch.device import TorchDevice
from workers.compute.torch.pages import lock
from workers.compute.torch.shelf import DIRECT


def device_of(kind: str) -> torch.device:
    """By `compute.device` of a configuration."""
    if kind == "cuda":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu" if kind == "torch-cpu" else kind)


def make(
    kind: str, source: Source, plan: Plan, threads: int, cache_codec: Codec, slots: Bytes
) -> tuple[TorchDevice, str]:
    """The device, and what must be said of it, if anything.

    `kind` is `compute.device` of a configuration. A GPU gives no more than `plan.device_bytes`. The ring's
    `slots` [slots, stride] are page-locked for CUDA where large units go over straight from them.
    """
    torch.set_num_threads(threads)
    where = device_of(kind)
    if plan.device_bytes is not None:
        _limit(where, plan.device_bytes)
    direct, problem = where.type != "mps" and plan.stride >= DIRECT, ""
    if direct and where.type == "cuda":
        problem = lock(slots)
        direct = not problem
    return TorchDevice(source, plan.context, cache_codec, where, plan.mirrored, direct), problem


def _limit(where: torch.device, size: int) -> None:
    """Take no more than `size` bytes of a GPU's memory."""
    if where.type == "cuda":
        total = torch.cuda.get_device_properties(where).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, size / total), where)
    elif where.type == "mps":
        torch.mps.set_per_process_memory_fraction(min(1.0, size / torch.mps.recommended_max_memory()))
