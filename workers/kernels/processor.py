"""Which instructions the loops may be made of: those of this machine, or of the one that numba compiles for.

`NUMBA_CPU_NAME` and `NUMBA_CPU_FEATURES` name another processor than this one, so that its code can be tested
and measured here: `NUMBA_CPU_NAME=haswell NUMBA_CPU_FEATURES=+avx2,+fma,+f16c,+bmi,+bmi2,+popcnt` is AVX2.
"""

from __future__ import annotations

import platform
from dataclasses import dataclass

from llvmlite import binding
from numba.core import config


@dataclass(frozen=True)
class Processor:
    """Which of the instructions there are."""

    madd: bool = False  # vpmaddwd and vpmaddubsw on 32 bytes
    dot: bool = False  # vpdpbusd on 32 bytes
    wide: bool = False  # vpdpbusd, and all that goes with it, on 64 bytes
    half: bool = False  # float16 → float32

    @classmethod
    def here(cls) -> Processor:
        """Of the processor that numba compiles for. Others compute the same by what every one has."""
        if platform.machine() not in ("x86_64", "AMD64"):
            return cls(half=platform.machine() in ("aarch64", "arm64"))
        there = features()
        wide = {"avx512f", "avx512bw", "avx512vl", "avx512vnni"} <= there
        return cls("avx2" in there, wide or "avxvnni" in there, wide, "f16c" in there)


def features() -> set[str]:
    """What LLVM calls the processor's abilities."""
    given: str | None = config.CPU_FEATURES  # type: ignore[attr-defined]
    if given is None:
        return {name for name, there in binding.get_host_cpu_features().items() if there}
    return {name[1:] for name in given.split(",") if name.startswith("+")}
