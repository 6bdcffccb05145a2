"""The photos that a command names: found, named, and brought together by their sizes."""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from cps_ray.datasets.lists import read_list
from cps_ray.datasets.prepare.patterns import Pattern
from cps_ray.datasets.raster import IMAGE_SUFFIXES, upright_size
from cps_ray.errors import DataError

_ALONE_BYTES = 4 * 2**20
"""Files as large are a batch of their own without being looked at: more than one would mostly be too many pixels."""

Size = tuple[int, int]
"""(height, width) in px."""


@dataclass(frozen=True, slots=True)
class Photo:
    """A file to predict."""

    path: str
    name: str
    """What its outputs are called, with subfolders and without suffix: `drive_a/00000`."""
    bytes: int
    """Its size, or -1 where it cannot be found."""
    mtime_ns: int
    """When it was changed last."""


def find_photos(given: Sequence[str], out: Path) -> list[Photo]:
    """Returns the photos of folders, patterns, files and lists (.txt), each once, in order; those in `out` are left aside.

    Files that a list names need not exist: they are reported when they are read. Raises DataError where nothing is found, and if two photos
    would have one name.
    """
    own = f"{os.path.abspath(out)}{os.sep}"
    photos: dict[str, Photo] = {}
    for each in given:
        if os.path.abspath(each) == os.path.abspath(out):
            raise DataError(f"{out}: must be another folder than that of the images.")
        for path, name in _files(each):
            absolute = os.path.abspath(path)
            if absolute.startswith(own):
                continue
            stem = str(PurePosixPath(name).with_suffix(""))
            other = photos.get(stem)
            if other is not None and os.path.abspath(other.path) != absolute:
                raise DataError(
                    f"{path} and {other.path} would both become labels/{stem}.png; rename one, or predict them into folders of their own."
                )
            if other is None:
                photos[stem] = _photo(path, stem)
    if not photos:
        raise DataError(f"{', '.join(given)}: must hold images ({' '.join(sorted(IMAGE_SUFFIXES))}), but has none.")
    return [*photos.values()]


def _photo(path: str, name: str) -> Photo:
    try:
        status = os.stat(path)
    except OSError:
        return Photo(path, name, -1, 0)
    return Photo(path, name, status.st_size, status.st_mtime_ns)


def _files(given: str) -> Iterator[tuple[str, str]]:
    """Yields the path of each file, and what of it its outputs keep."""
    path = Path(given)
    if path.is_dir():
        for found in Pattern("**").find(path):
            if found.path.suffix.lower() in IMAGE_SUFFIXES:
                yield str(found.path), found.path.relative_to(path).as_posix()
    elif path.is_file() and path.suffix.lower() == ".txt":
        for line in read_list(path):
            name = line if (path.parent / line).exists() else line.strip()
            kept = PurePosixPath(os.path.normpath(name))
            yield str(path.parent / name), kept.name if kept.is_absolute() or ".." in kept.parts else str(kept)
    elif path.is_file():
        yield given, path.name
    elif re.search(r"[*?\[]", given):
        parts = path.parts
        wild = next(number for number, part in enumerate(parts) if re.search(r"[*?\[]", part))
        folder = Path(*parts[:wild])
        if folder.is_dir():
            for found in Pattern("/".join(parts[wild:])).find(folder):
                yield str(found.path), found.path.relative_to(folder).as_posix()
    else:
        raise DataError(f"{given}: must be a folder, a pattern, an image or a list (.txt), but there is no such file.")


def cut_into_chunks(
    photos: Sequence[Photo], known: Mapping[str, Size], budget_px: int, threads: int
) -> list[list[Photo]]:
    """Returns the photos in chunks of one size that have at most `budget_px` pixels together, or of one photo; the largest first.

    `known`: sizes by name, where they need not be looked up. A photo whose header cannot be read is a chunk of its own.
    """

    def size_of(photo: Photo) -> Size | None:
        return None if photo.bytes > _ALONE_BYTES else known.get(photo.name) or _look_up_size(photo)

    with ThreadPoolExecutor(threads) as pool:
        sizes = [*pool.map(size_of, photos)]
    chunks = [[photo] for photo, size in zip(photos, sizes, strict=True) if size is None]
    by_size: dict[Size, list[Photo]] = {}
    for photo, size in zip(photos, sizes, strict=True):
        if size is not None:
            by_size.setdefault(size, []).append(photo)
    for (height, width), same in sorted(by_size.items(), key=lambda item: -item[0][0] * item[0][1]):
        count = max(1, budget_px // (height * width))
        chunks += [same[first : first + count] for first in range(0, len(same), count)]
    return chunks


def _look_up_size(photo: Photo) -> Size | None:
    try:
        return upright_size(Path(photo.path).read_bytes(), photo.path)[0]
    except (OSError, DataError):
        return None
