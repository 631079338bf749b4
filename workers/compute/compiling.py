"""Compiles a ring's kernels, each few in a process of their own, before the ring takes its memory.

Compiling takes some 250 MiB, which a process keeps to its end; what is compiled is loaded for a few. So no
worker compiles: it says that kernels are missing, and the supervisor runs this module and starts it again.

    python -m workers.compute.compiling STORE CACHE_CODEC ACTIVATIONS SCORER DEVICE          a ring's kernels
    python -m workers.compute.compiling STORE CACHE_CODEC ACTIVATIONS SCORER DEVICE KIND …   those of one task
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
from pathlib import Path

from pipeline.launch import module_command
from storage.codecs import CODECS
from storage.shadow import KIND as SHADOW
from storage.shadow import Shadow
from storage.store import Store
from workers.compute.weights import attention_codecs, codecs, expert_codecs, feeding_codecs

Task = tuple[str, ...]  # a kind, and names of codecs


def of_compute(store: Store, cache: str, kind: str, device: str = "cpu") -> list[Task]:
    """What compute needs, for keys and values in the codec `cache`, and a forecast of this kind.

    On other devices than the CPU that is a router's product.
    """
    fed = {tuple(codec.name for codec in rows) for rows in feeding_codecs(store)}
    found = {codec.name for codec in codecs(store)}
    if kind == SHADOW:
        codec = Shadow.open(store).codec
        found.add(codec)
        fed |= {(codec,) * len(rows) for rows in fed}
    weights = [("weights", name) for name in sorted(found)]
    if device != "cpu":
        return [*weights] if store.architecture.mixture else []
    attention = [
        ("attention", qkv.name, out.name, cache, router.name) for qkv, out, router in attention_codecs(store)
    ]
    experts = [("experts", *(codec.name for codec in three)) for three in expert_codecs(store)]
    feeding = [("feeding", *names) for names in sorted(fed)]
    return [*weights, *attention, *feeding, *experts]


def of_predictor(scorer: str) -> list[Task]:
    """What the predictor needs beyond that, for a scorer of this kind."""
    return [("scores",)] if scorer == "lowrank" else []


def prepare(task: Task, store: Store) -> None:
    """Compile a task's kernels, or load them."""
    from workers import kernels  # for who only lists tasks they are too heavy

    match task:
        case "weights", codec:
            kernels.warm(CODECS[codec], store.architecture)
        case "attention", *names:
            kernels.warm_attention(*(CODECS[name] for name in names))
        case "feeding", *names:
            kernels.warm_feeding(*(CODECS[name] for name in names))
        case "experts", *names:
            kernels.warm_experts(*(CODECS[name] for name in names))
        case _:
            kernels.warm_scores()


def ready(tasks: list[Task], store: Store, may_compile: bool) -> bool:
    """Load the tasks' kernels; unless they may be compiled here, False where one would have to be."""
    from workers.kernels.compiled import NotCompiled, only_loaded

    try:
        with contextlib.nullcontext() if may_compile else only_loaded():
            for task in tasks:
                prepare(task, store)
    except NotCompiled:
        return False
    return True


def main(path: str, cache: str, activations: str, scorer: str, device: str, *task: str) -> int:
    """The exit status. `activations` and `device` are the configuration's, `scorer` is its kind."""
    store = Store.open(Path(path))
    if task:
        from workers import kernels

        kernels.ACTIVATIONS.exact = activations == "exact"
        prepare(task, store)
        return 0
    tasks = [*of_compute(store, cache, scorer, device), *of_predictor(scorer)]
    for number, one in enumerate(tasks, 1):
        print(number, len(tasks), flush=True)  # `pipeline.ring.compiling` tells it
        command = module_command("workers.compute.compiling", path, cache, activations, scorer, device, *one)
        if status := subprocess.run(command, stdout=subprocess.DEVNULL, check=False).returncode:
            return status
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
