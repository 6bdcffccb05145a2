"""List files of ids, in the forms people have: one id a line, paths, or several columns of which the first counts."""

import codecs
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PurePosixPath

from cps_ray.errors import DataError
from cps_ray.files import write_text


def normalized(text: str) -> str:
    """Returns text in the form in which names are compared: macOS writes accents as characters of their own, Linux does not."""
    return unicodedata.normalize("NFC", text)


def read_list(path: Path, hint: str = "") -> dict[str, int]:
    """Returns the lines of a list file that are not empty, as they stand, and the number of each, in order.

    UTF-8, or UTF-16 with a byte order mark. DataError if the file cannot be read, is empty, or has a line twice; `hint` ends the
    first message.
    """
    try:
        data = path.read_bytes()
        text = data.decode("utf-16" if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig")
    except (OSError, UnicodeDecodeError) as err:
        raise DataError(f"{path}: the list of ids cannot be read ({err}).{hint and ' ' + hint}") from err
    if "\0" in text:
        raise DataError(f"{path}: a list of ids must be text, but this file is not; save it as UTF-8.")
    line_of: dict[str, int] = {}
    # Not splitlines: names may hold the other characters at which it splits.
    for number, line in enumerate(re.split("\r\n|\r|\n", text), start=1):
        if not line.strip():
            continue
        if line in line_of:
            raise DataError(f"{path}:{number}: {line!r} is listed twice, first in line {line_of[line]}.")
        line_of[line] = number
    if not line_of:
        raise DataError(f"{path}: the list must name at least one image, but is empty.")
    return line_of


def listed_ids(path: Path, image_ids: Iterable[str], owner: str, *, hint: str = "", remedy: str = "") -> dict[str, int]:
    """Returns the ids that the lines of a list file mean, and the number of each line, in order.

    DataError if the file cannot be read, is empty, or has a line that means none of `image_ids`, several, or one for the second
    time. Messages name the images as those of `owner`; `remedy` is a sentence for the one about an unknown id. See `read_list` for `hint`.
    """
    ids = list(image_ids)
    entries = read_list(path, hint)
    match = matcher(ids)
    meant = {entry: match(entry) for entry in entries}
    unknown = [entry for entry, matches in meant.items() if not matches]
    if unknown:
        others = f", nor are {len(unknown) - 1} more of {len(entries)} entries" if len(unknown) > 1 else ""
        example = f", whose ids look like {ids[0]!r}" if ids else ""
        raise DataError(
            f"{path}:{entries[unknown[0]]}: {unknown[0].strip()!r} is no image of {owner}{example}{others}.{remedy and ' ' + remedy}"
        )
    line_of: dict[str, int] = {}
    for entry, (key, *more) in meant.items():
        where = f"{path}:{entries[entry]}: {entry.strip()!r}"
        if more:
            raise DataError(
                f"{where} must mean one image of {owner}, but fits {key!r} and {more[0]!r}; write the whole id."
            )
        # Lines that differ may mean one image: an id, and its path.
        if key in line_of:
            raise DataError(f"{where} is listed twice, first in line {line_of[key]}.")
        line_of[key] = entries[entry]
    return line_of


def matcher(image_ids: Iterable[str]) -> Callable[[str], tuple[str, ...]]:
    """Returns a function from a line of a list to those of `image_ids` that it fits: the one that it means, none, or several.

    A line may be an id or its end, a path of the image, or a path with a data set's suffix (`CITY_SEQ_FRAME_leftImg8bit.png`),
    alone or before further columns.
    """
    exact = set(image_ids)
    by_name: dict[str, list[str]] = {}
    by_end: dict[str, list[str]] = {}
    for image_id in sorted(exact):
        name = normalized(image_id)
        by_name.setdefault(name, []).append(image_id)
        while "/" in name:
            name = name.partition("/")[2]
            by_end.setdefault(name, []).append(image_id)
    spaces = any(" " in name for name in by_name)

    def meant(path: str, dropped: str) -> list[str]:
        """Returns the ids that a path without the folders `dropped` fits."""
        stem = path.removesuffix(PurePosixPath(path).suffix)
        name, _, suffix = stem.rpartition("_")
        forms = [by_name.get(path), by_name.get(stem)]
        # An end of an id is named by what stands in the list, not by a path in another folder.
        forms += [by_end.get(path), by_end.get(stem)] if not dropped.strip("./") else []
        forms += [by_name.get(name)] if suffix[:1].isalpha() else []
        return next((ids for ids in forms if ids), [])

    def match(line: str) -> tuple[str, ...]:
        # The line as it stands comes first: an id may hold spaces and slashes, and end in what looks like a suffix.
        if line in exact:
            return (line,)
        far: dict[str, None] = {}
        for column in _columns(normalized(line), spaces):
            for dropped, path in _tails(column):
                ids = meant(path, dropped)
                # Is what lies before the path a folder with a space in its name, or another column? Decided when all are seen.
                if re.search(r"\s", dropped):
                    far |= dict.fromkeys(ids)
                elif ids:
                    return tuple(ids)
        return tuple(far)

    return match


def _columns(line: str, spaces: bool) -> Iterator[str]:
    """Yields what may be the first column of a line, longest first; `spaces`: ids hold spaces."""
    columns = [line, line.strip(), line.partition("\t")[0].strip()]
    parts = [columns[-1][: space.start()] for space in re.finditer(r"\s+", columns[-1])]
    # Where names hold spaces, `photo 3.jpg` is no `photo` with a second column, even if there is no `photo 3`.
    columns += [part for part in reversed(parts) if not spaces or PurePosixPath(part).suffix]
    return iter(dict.fromkeys(columns))


def _tails(path: str) -> Iterator[tuple[str, str]]:
    """Yields (what is left out, rest) of a path: whole, without its first folder, and so on."""
    path = path.replace("\\", "/")
    yield "", path
    for slash in re.finditer("/+", path):
        yield path[: slash.end()], path[slash.end() :]


def write_list(path: Path, ids: Iterable[str]) -> None:
    """Writes one id a line; makes the folder if need be. DataError if an id has a line break, which no list can hold."""
    lines = list(ids)
    broken = next((line for line in lines if {"\n", "\r"} & {*line}), None)
    if broken is not None:
        raise DataError(f"{path}: ids must be of one line each, but {broken!r} is not; rename the file.")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, "".join(f"{line}\n" for line in lines))
