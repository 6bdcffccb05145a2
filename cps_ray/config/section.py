"""The base of every config section, regular expressions, and paths that are relative to the file they are written in."""

import os
import re
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, PlainSerializer, SerializationInfo, ValidationInfo


class Section(BaseModel):
    """Base of every config section: frozen, refuses unknown keys, inf and nan."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, validate_default=True, use_attribute_docstrings=True
    )


def _check_regex(regex: str) -> str:
    try:
        re.compile(regex)
    except re.error as error:
        raise ValueError(f"must be a regular expression, but got {regex!r}: {error}.") from None
    return regex


Regex = Annotated[str, AfterValidator(_check_regex)]


def _base(context: Any) -> Path | None:
    return Path(context["base"]) if context and context.get("base") else None


def _absolute(path: Path, info: ValidationInfo) -> Path:
    """Returns the absolute path of one that is relative to the folder `base` of the validation context."""
    base = _base(info.context)
    return Path(os.path.abspath((base or Path()) / os.path.expanduser(path)))


def _portable(path: Path, info: SerializationInfo) -> str:
    """Returns the path relative to the folder `base` of the serialization context, so that folders can be moved together."""
    base = _base(info.context)
    return os.path.relpath(path, base) if base else str(path)


RelativePath = Annotated[Path, AfterValidator(_absolute), PlainSerializer(_portable, return_type=str)]
"""Path that a file gives relative to its own folder, that is absolute in memory, and that is dumped relative to `base`."""
