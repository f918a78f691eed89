"""Configuration files of networks and schedulers in diffusers' format: version, and a check of supported values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from models.json_files import JsonObject

DIFFUSERS_VERSION = version("diffusers")
"""The `_diffusers_version` of the files that we write."""
Supported: TypeAlias = Mapping[str, Sequence[object]]
"""Key of a configuration -> supported values; the first is diffusers' default, which stands for an absent key."""


def require_supported(config: JsonObject, supported: Supported, what: str) -> None:
    """Check that every value of a configuration is one that this code reproduces.

    `what` names the owner of the configuration in the error message, such as "network".

    Raises:
        ValueError: for the first unsupported value, in one sentence.
    """
    for key, values in supported.items():
        value = config.get(key, values[0])
        if value not in values:
            known = ", ".join(map(repr, values))
            raise ValueError(f"the {what}'s {key} is {value!r}; supported: {known}")
