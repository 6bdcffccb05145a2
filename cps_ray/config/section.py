"""The base of every config section, and paths that are relative to the file they are written in."""

import os
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, PlainSerializer, SerializationInfo, ValidationInfo


class Section(BaseModel):
    """Base of every config section: cannot change, knows its keys, refuses inf and nan."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, validate_default=True, use_attribute_docstrings=True
    )


def _base(context: Any) -> Path | None:
    return Path(context["base"]) if context and context.get("base") else None


def _absolute(path: Path, info: ValidationInfo) -> Path:
    """A path in a file is relative to that file's folder (validation context `base`)."""
    base = _base(info.context)
    return Path(os.path.abspath((base or Path()) / os.path.expanduser(path)))


def _portable(path: Path, info: SerializationInfo) -> str:
    """Relative to the folder the config is written into (serialization context `base`), so that folders can move."""
    base = _base(info.context)
    return os.path.relpath(path, base) if base else str(path)


RelativePath = Annotated[Path, AfterValidator(_absolute), PlainSerializer(_portable, return_type=str)]
"""Written relative to its file, held absolute, dumped relative to the file it is dumped into."""
