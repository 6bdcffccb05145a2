"""List files of ids, in the forms people have: one id a line, paths, or several columns of which the first counts."""

from collections.abc import Callable, Iterable
from pathlib import Path, PurePosixPath

from cps_ray.errors import DataError


def read_list(path: Path, hint: str = "") -> dict[str, int]:
    """Returns the entries of a list file and the line of each, in order: the first column of a line, split at spaces or tabs.

    DataError if the file cannot be read, is empty, or lists an entry twice; `hint` ends the first message.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()  # drops a byte order mark
    except (OSError, UnicodeDecodeError) as err:
        raise DataError(f"{path}: the list of ids cannot be read ({err}).{hint and ' ' + hint}") from err
    line_of: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        name = line.split()[0]
        if name in line_of:
            raise DataError(f"{path}:{number}: {name!r} is listed twice, first in line {line_of[name]}.")
        line_of[name] = number
    if not line_of:
        raise DataError(f"{path}: the list must name at least one image, but is empty.")
    return line_of


def matcher(image_ids: Iterable[str]) -> Callable[[str], str | None]:
    """Returns a function from an entry of a list to the one of `image_ids` that it means, or None.

    An entry may be an id, a path of the image, or a path with a data set's suffix (`CITY_SEQ_FRAME_leftImg8bit.png`).
    """
    ids = set(image_ids)

    def match(entry: str) -> str | None:
        stem = PurePosixPath(entry.replace("\\", "/")).stem
        # The entry as it stands comes first: an id may itself hold slashes or end in what looks like a suffix.
        forms = (entry, stem, stem.rpartition("_")[0])
        return next((form for form in forms if form in ids), None)

    return match


def write_list(path: Path, ids: Iterable[str]) -> None:
    """Writes one id a line; makes the folder if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{image_id}\n" for image_id in ids), encoding="utf-8")
