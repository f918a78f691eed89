"""Base of the typed JSON files that one stage writes and later stages read."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from models.json_files import JsonObject
from tasks.runtime import atomic, integrity
from tasks.runtime.errors import StageError


class Part(BaseModel):
    """A nested object of a stage file; unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class StageFile(Part):
    """A JSON file with a format number, which `STAGE` writes."""

    FORMAT: ClassVar[int]
    """Version of the file format, stored under the key `format`."""
    STAGE: ClassVar[str]
    """The stage that writes the file."""

    @classmethod
    def read(cls, file: Path) -> Self:
        """Read and check the file.

        Raises:
            StageError: if it is missing, damaged or of another format; names the command that writes it again.
        """
        values = integrity.read_json(file, cls.STAGE)
        found = values.pop("format", None)
        if found != cls.FORMAT:
            raise StageError(f"{file} has format {found}, not {cls.FORMAT}; {integrity.remedy(cls.STAGE)}")
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(map(str, first["loc"]))
            raise StageError(f"{file} is damaged ({key}: {first['msg']}); {integrity.remedy(cls.STAGE)}") from None

    def to_json(self) -> JsonObject:
        """Return the content of the file, with its format number."""
        return {"format": self.FORMAT, **self.model_dump(mode="json")}

    def write(self, file: Path) -> None:
        """Write the file atomically; equal values give equal bytes."""
        atomic.write_json(file, self.to_json())
