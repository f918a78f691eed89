"""JSON files: one way to read and write them, and typed descriptions with a format number.

Needs the standard library alone, because the ONNX bundle contains a copy of this file.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, ClassVar, Self, TypeAlias

JsonObject: TypeAlias = dict[str, Any]  # JSON values have no narrower type before a description checks them


def read_json(file: Path) -> Any:  # whatever the file holds; callers check it
    """Parse a UTF-8 JSON file."""
    return json.loads(file.read_text(encoding="utf-8"))


def write_json(file: Path, value: object) -> None:
    """Write JSON with sorted keys and an indent of 2: equal values give equal bytes."""
    text = json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
    file.write_text(text + "\n", encoding="utf-8")


@dataclasses.dataclass(frozen=True)
class Description:
    """Base of the dataclasses that are stored as a JSON file of their own."""

    FORMAT: ClassVar[int]
    """Version of the file format, stored under the key `format`."""
    REMEDY: ClassVar[str]
    """What to do about a file of another format, as the end of an error message."""

    @classmethod
    def read(cls, file: Path) -> Self:
        """Read a description; unknown keys are ignored.

        Raises:
            ValueError: for another format or a missing key, in one sentence.
            FileNotFoundError: when there is no such file.
        """
        values = read_json(file)
        found = values.get("format") if isinstance(values, dict) else None
        if found != cls.FORMAT:
            raise ValueError(f"{file} has format {found}, this version reads format {cls.FORMAT}; {cls.REMEDY}")
        known = {field.name: field for field in dataclasses.fields(cls)}
        required = {name for name, field in known.items() if _is_required(field)}
        if missing := sorted(required - set(values)):
            raise ValueError(f"{file} lacks {', '.join(missing)}; {cls.REMEDY}")
        return cls.from_json({name: value for name, value in values.items() if name in known})

    @classmethod
    def from_json(cls, values: JsonObject) -> Self:
        """Build the description from the checked keys of its file."""
        return cls(**values)

    def to_json(self) -> JsonObject:
        """Return the content of the file, without the format number."""
        return dataclasses.asdict(self)

    def write(self, file: Path) -> None:
        """Write the description with its format number."""
        write_json(file, {"format": self.FORMAT, **self.to_json()})


def _is_required(field: dataclasses.Field[Any]) -> bool:  # Field is generic in the type of its default
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
