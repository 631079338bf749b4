"""One thing that was looked at."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeAlias

# fine: as it should be; less: it runs, slower or with less; broken: it does not run; told: only to be known
State: TypeAlias = Literal["fine", "less", "broken", "told"]


@dataclass(frozen=True, slots=True)
class Finding:
    """`consequence` and `remedy` are whole sentences; empty where all is fine."""

    name: str
    state: State
    found: str
    consequence: str = ""
    remedy: str = ""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)
