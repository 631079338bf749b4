"""`progress.json`: how far a conversion has come, so that a killed one resumes."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from storage.convert.conversion import Conversion, same_parameters
from storage.errors import StoreIncomplete, UsageError
from storage.files import TEMPORARY, write_whole

PROGRESS = "progress.json"


@dataclass(slots=True)
class Journal:
    """What is complete and synced in the directory of an unfinished conversion."""

    directory: Path
    parameters: dict[str, Any]
    layers: int = 0  # whole layers of bundles.bin
    resident: dict[str, Any] | None = None  # the file entry of resident.safetensors, once it is whole

    @classmethod
    def open(cls, directory: Path, conversion: Conversion) -> Journal:
        """Raises UsageError for a directory of another kind, StoreIncomplete for another conversion's."""
        path = directory / PROGRESS
        if not path.is_file():
            if any(file.name != PROGRESS + TEMPORARY for file in directory.iterdir()):
                raise UsageError(f"{directory} exists and is not an interrupted conversion: remove it")
            return cls(directory, conversion.parameters)
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            journal = cls(directory, conversion.parameters, data["layers"], data["resident"])
            same = same_parameters(data["parameters"], conversion.parameters)
            if type(journal.layers) is not int:
                raise TypeError("a number of layers that is none")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise StoreIncomplete(
                f"{path} is damaged: remove {directory} to convert from the start"
            ) from error
        if not same:
            raise StoreIncomplete(
                f"{directory} was started from another checkpoint or with other parameters: "
                "use those, or remove it to convert from the start"
            )
        return journal

    def record(self) -> None:
        """Write durably and atomically."""
        data = {"parameters": self.parameters, "layers": self.layers, "resident": self.resident}
        write_whole(self.directory / PROGRESS, json.dumps(data, indent=2).encode())
