"""Patterns find the raw files of a data set: what `*`, `**` and `{id}` match, and which id a file has."""

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath

from cps_ray.datasets.lists import normalized
from cps_ray.errors import DataError

ID = "{id}"
_JUNK = frozenset(
    {
        "thumbs.db",
        "ehthumbs.db",
        "desktop.ini",
        "icon\r",
        "@eadir",
        "@recycle",
        "@recently-snapshot",
        "#recycle",
        "#snapshot",
        "__macosx",
        "$recycle.bin",
        "system volume information",
        "lost+found",
    }
)
"""Files and folders, in lower case, that Windows, macOS, network drives and archivers put among images."""
_TOKENS = re.compile(r"(\*|\?|\[[^\]]+\])")
_SUFFIXES = {"jpg": "jpe?g", "jpeg": "jpe?g", "tif": "tiff?", "tiff": "tiff?"}
"""Suffix of a pattern -> regular expression for the suffixes that mean the same."""


@dataclass(frozen=True, slots=True)
class Found:
    """A file that a pattern found."""

    path: Path
    id: str
    """What `{id}` stands for or, without it, the file's name without suffix."""
    long_id: str
    """The same, but without `{id}` the folders, too, that wildcards of the pattern matched: `drive_a/00000`."""


@dataclass(frozen=True)
class Pattern:
    """A pattern of paths relative to the raw folder. `*` matches within a name; `**` and `{id}` also match folders."""

    text: str

    @cached_property
    def _parts(self) -> tuple[str, ...]:
        return PurePosixPath(normalized(self.text)).parts

    @cached_property
    def regex(self) -> re.Pattern[str]:
        """Regular expression of the paths that the pattern matches. Raises re.error if there is none."""
        regex, is_first = "", True
        for number, part in enumerate(self._parts):
            is_last = number == len(self._parts) - 1
            if part == "**":
                regex += rf"(?P<part{number}>(?:[^/]+/)*{'[^/]+' if is_last else ''})"
                continue
            head, *tails = part.split(ID)
            text = _glob_to_regex(head) if tails else _name_to_regex(head, is_last)
            for tail_number, tail in enumerate(tails, start=1):
                # Where `{id}` stands more than once, all must be the same text.
                text += "(?P<id>.+)" if is_first else "(?P=id)"
                text += _name_to_regex(tail, is_last and tail_number == len(tails))
                is_first = False
            regex += f"(?P<part{number}>{text})" if _TOKENS.search(part) else text
            regex += "" if is_last else "/"
        return re.compile(regex, re.DOTALL)

    def ids(self, path: str) -> tuple[str, str] | None:
        """Returns the id and the long id (see `Found`) of a path relative to the raw folder; None if it does not match."""
        match = self.regex.fullmatch(normalized(path))
        if match is None:
            return None
        if ID in self.text:
            return match["id"], match["id"]
        stem = PurePosixPath(match[0]).stem
        wild = {name: text.rstrip("/") for name, text in match.groupdict().items()}
        file = wild.pop(f"part{len(self._parts) - 1}", None)
        if file is not None:  # a wildcard stands in the name of the file, too
            wild["file"] = PurePosixPath(file).with_name(stem).as_posix()
        return stem, "/".join(filter(None, wild.values())) or stem

    def find(self, raw: Path) -> list[Found]:
        """Returns the files below `raw` that the pattern matches, sorted by path.

        Links to folders are followed. Hidden files and folders are left out, and what systems put among images, unless the
        pattern names them. Raises DataError if a folder cannot be read, or if the name of a file cannot be an id.
        """
        found = []
        for name in self._walk(raw, ""):
            if (ids := self.ids(name)) is not None:
                _refuse_odd_name(raw, name)
                found.append(Found(raw / name, *ids))
        return found

    def _walk(self, raw: Path, folder: str, depth: int = 0, above: Sequence[tuple[int, int]] = ()) -> Iterator[str]:
        """Yields the paths, relative to `raw`, of the files in a folder, `depth` folders below, that the pattern may match."""
        try:
            status = (raw / folder).stat()
            entries = sorted(os.scandir(raw / folder), key=lambda entry: entry.name)
        except OSError as error:
            raise DataError(
                f"{raw / folder}: the folder cannot be read ({error.strerror}); fix its permissions."
            ) from None
        identity = (status.st_dev, status.st_ino)
        if identity in above:  # a link to a folder that holds it
            return
        spans = next((n for n, part in enumerate(self._parts) if part == "**" or ID in part), len(self._parts))
        part = self._parts[depth] if depth < spans else "**"
        name_regex = None if part == "**" else re.compile(_name_to_regex(part, depth == len(self._parts) - 1))
        for entry in entries:
            name = normalized(entry.name)
            is_junk = name.startswith(".") or name.lower() in _JUNK
            if (is_junk and part != name) or (name_regex and not name_regex.fullmatch(name)):
                continue
            path = f"{folder}/{entry.name}".removeprefix("/")
            is_link = entry.is_symlink()
            # Not `entry.is_dir()` for a link: it raises where links lead in a circle.
            if Path(entry.path).is_dir() if is_link else entry.is_dir():
                if spans < len(self._parts) or depth + 1 < len(self._parts):
                    yield from self._walk(raw, path, depth + 1, (*above, identity))
            # A link that leads nowhere counts, because it is an image that was not fetched; a pipe does not: reading it waits.
            elif is_link or entry.is_file():
                yield path


def _glob_to_regex(glob: str) -> str:
    # Not fnmatch.translate: its `*` also crosses folders.
    meanings = {"*": "[^/]*", "?": "[^/]"}

    def bracket(token: str) -> str:
        negated = token.startswith("[!")
        inner = re.sub(r"([\\\[^&~|])", r"\\\1", token[1 + negated : -1])
        # It also matches itself, as in a folder that is called `set [v2]`.
        return f"(?:(?!/)[{'^' * negated}{inner}]|{re.escape(token)})"

    tokens = _TOKENS.split(glob)
    return "".join(
        meanings.get(token) or (bracket(token) if number % 2 else re.escape(token))
        for number, token in enumerate(tokens)
    )


def _name_to_regex(glob: str, is_file: bool) -> str:
    """Returns the regular expression for a name, or the end of one; a file's suffix may be in any case."""
    stem, dot, suffix = glob.rpartition(".")
    if not (is_file and dot):
        return _glob_to_regex(glob)
    return rf"{_glob_to_regex(stem)}\.(?i:{_SUFFIXES.get(suffix.lower()) or _glob_to_regex(suffix)})"


def _refuse_odd_name(raw: Path, name: str) -> None:
    """Raises DataError for a path, relative to `raw`, that neither a list of ids nor a shard can hold."""
    try:
        name.encode()
        if not ({"\n", "\r"} & {*name}) and PurePosixPath(name).stem.strip():
            return
        found = "has a line break, or nothing that can be seen"
    except UnicodeEncodeError:
        found = "is not UTF-8"
    shown = os.fsencode(raw / name).decode(errors="backslashreplace")
    raise DataError(f"{shown!r}: the name of a file becomes its id, but this one {found}; rename it.")
