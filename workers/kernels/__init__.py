"""CPU kernels: products of stored weights with float32 vectors, compiled by numba.

Read `codecs.py` first: it says what a loop needs of a number format. Then `rows.py`, the inner loops, and
`launch.py`, how threads share the work. What is made of them: `dense.py`, `ffn.py` with `sums.py` and
`functions.py`, `experts.py` with `routing.py`, `attention.py`; and for many tokens `panels.py`. `norms.py`
stands alone. Rows in eight and four bits have `prepare.py`, `grouped.py` and `emitter.py`, made of the
`instructions.py` of a `processor.py`, those of MXFP4 `microscaled.py`. `warming.py` has all loaded in time,
`compiled.py` notices one that is not compiled.

Weights stay in the checkpoint's number format and are widened in registers. All sums are float32. Every
loop is written once, and compiled for each codec that is used. Its caller's `Rows` say which elements of
memory it reads.

The result of every kernel is the same bits whatever the number of threads: one thread owns a whole output
(a row of a product, a head, a column of an FFN sum), and there is one compiled version of each loop, which
a single thread runs as well. Compiled code is cached in a user directory.

Import this package before torch, so that its settings reach OpenMP.
"""

from __future__ import annotations

import os

from pipeline.directories import kernel_cache

# Numba and OpenMP read these when they are first loaded. Waiting threads must sleep: four workers
# share the cores, and a thread that spins takes its core from the reader that it waits for
# (a launch on two busy cores took 680 µs spinning and 16 µs sleeping).
os.environ["NUMBA_CACHE_DIR"] = str(kernel_cache()[0])
os.environ.setdefault("NUMBA_THREADING_LAYER_PRIORITY", "omp tbb workqueue")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from workers.kernels.attention import Around, Attending, attend
from workers.kernels.dense import NO_BIAS, matvec, matvecs
from workers.kernels.experts import add_weighted, outputs
from workers.kernels.feeding import Feeding
from workers.kernels.ffn import accumulate, activate, activate_gated
from workers.kernels.functions import activations
from workers.kernels.launch import notes, start_threads
from workers.kernels.lowrank import passing, score
from workers.kernels.norms import layer_norm, rms_norm
from workers.kernels.panels import combine, in_panels, multiply, new_panels, out_of_panels
from workers.kernels.routing import choose
from workers.kernels.rows import ACTIVATIONS
from workers.kernels.warming import warm, warm_attention, warm_experts, warm_feeding, warm_scores

__all__ = [
    "ACTIVATIONS",
    "NO_BIAS",
    "Around",
    "Attending",
    "Feeding",
    "accumulate",
    "activate",
    "activate_gated",
    "activations",
    "add_weighted",
    "attend",
    "choose",
    "combine",
    "in_panels",
    "layer_norm",
    "matvec",
    "matvecs",
    "multiply",
    "new_panels",
    "notes",
    "out_of_panels",
    "outputs",
    "passing",
    "rms_norm",
    "score",
    "start_threads",
    "warm",
    "warm_attention",
    "warm_experts",
    "warm_feeding",
    "warm_scores",
]
