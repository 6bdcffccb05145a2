"""List files of ids, in the forms people have: one id a line, paths, or several columns of which the first counts."""

from collections.abc import Callable, Iterable
from pathlib import Path, PurePosixPath

from cps_ray.errors import DataError


def read_list(path: Path, hint: str = "") -> dict[str, int]:
    """Entries of a list file -> their line, in order: the first column of each line, split at spaces or tabs.

    DataError if the file cannot be read, is empty, or lists an entry twice; `hint` ends the first message.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as err:
        raise DataError(f"{path}: the list of ids cannot be read ({err}).{hint and ' ' + hint}") from err
    found: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        name = line.split()[0]
        if name in found:
            raise DataError(f"{path}:{number}: {name!r} is listed twice, first in line {found[name]}.")
        found[name] = number
    if not found:
        raise DataError(f"{path}: the list must name at least one image, but is empty.")
    return found


def matcher(known: Iterable[str]) -> Callable[[str], str | None]:
    """Entry of a list -> the known id it means, or None.

    An entry may be an id, a path of the image, or a path with a data set's suffix (`CITY_SEQ_FRAME_leftImg8bit.png`).
    """
    ids = set(known)

    def match(entry: str) -> str | None:
        stem = PurePosixPath(entry.replace("\\", "/")).stem
        forms = (entry, stem, stem.rpartition("_")[0])
        return next((form for form in forms if form in ids), None)

    return match


def write_list(path: Path, ids: Iterable[str]) -> None:
    """One id a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{one}\n" for one in ids), encoding="utf-8")
