"""Whether shards still are what was written: every file, image and mask read once, against manifest and index."""

import hashlib
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np

from cps_ray.datasets.images import decode_image, decode_mask
from cps_ray.datasets.prepare.findings import Finding
from cps_ray.datasets.shards import Encoded, Index, Manifest, ShardFile
from cps_ray.engine.batch import IGNORE
from cps_ray.errors import DataError

_ROWS_AT_ONCE = 16


def verified(manifest: Manifest, indexes: Mapping[str, Index]) -> Iterator[tuple[int, list[Finding]]]:
    """Reads everything, in threads: (images that were looked at, what is wrong with them), in no certain order.

    All findings are fatal and name a file. The numbers of images add up to those of the indexes.
    """
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        waiting: list[Future[tuple[int, list[Finding]]]] = []
        for split, index in indexes.items():
            for number, file in enumerate(manifest.splits[split].files):
                path, rows = index.locations.files[number], np.flatnonzero(index.locations.file == number)
                if not os.access(path, os.R_OK):  # said once, not for each of its images
                    finding = _finding(path, "the file is missing or cannot be read")
                    waiting.append(pool.submit(lambda done: done, (len(rows), [finding])))
                    continue
                # A file's images follow its checksum while it is still in the page cache.
                waiting.append(pool.submit(partial(_file, path, file)))
                parts = [rows[at : at + _ROWS_AT_ONCE].tolist() for at in range(0, len(rows), _ROWS_AT_ONCE)]
                waiting += [pool.submit(partial(_rows, index, part)) for part in parts]
        try:
            for future in as_completed(waiting):
                yield future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def damage(path: str | Path, error: DataError) -> Finding:
    """What an error says of a file, as a finding."""
    return _finding(str(path), _sentence(str(error).removeprefix(f"{path}: ")))


def _finding(path: str, found: str) -> Finding:
    return Finding("shards are damaged", path, found, "prepare the data set again")


def _sentence(text: str) -> str:
    """Without the remedy, which is the same for all damage."""
    return text.partition(";")[0].removesuffix(".")


def _file(path: str, file: ShardFile) -> tuple[int, list[Finding]]:
    try:
        with open(path, "rb") as stream:
            size, digest = os.fstat(stream.fileno()).st_size, hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        return 0, [_finding(path, f"the file cannot be read ({error.strerror})")]
    if size != file.bytes:
        return 0, [_finding(path, f"the file has {size} bytes, but the manifest says {file.bytes}")]
    if digest != file.sha256:
        return 0, [
            _finding(path, f"the file's sha256 is {digest[:12]}..., but the manifest says {file.sha256[:12]}...")
        ]
    return 0, []


def _rows(index: Index, rows: list[int]) -> tuple[int, list[Finding]]:
    return len(rows), list(chain.from_iterable(_row(index, row) for row in rows))


def _row(index: Index, row: int) -> Iterator[Finding]:
    path = index.locations.files[index.locations.file[row]]
    try:
        one = index.locations.read([row])[0]
    except DataError as error:
        yield damage(path, error)
        return
    yield from (_finding(path, trouble) for trouble in _troubles(index, row, one))


def _troubles(index: Index, row: int, one: Encoded) -> Iterator[str]:
    """What the pixels say against the index."""
    size = (int(index.height[row]), int(index.width[row]))
    try:
        image = decode_image(one.image)
        mask = None if one.mask is None else decode_mask(one.mask)
    except DataError as error:
        yield f"{one.id}: {_sentence(str(error))}"
        return
    if image.shape[:2] != size:
        yield f"the image of {one.id} has {image.shape[1]}x{image.shape[0]} px, but the index says {size[1]}x{size[0]}"
    if mask is None:
        return
    if mask.shape != size:
        yield f"the mask of {one.id} has {mask.shape[1]}x{mask.shape[0]} px, but the index says {size[1]}x{size[0]}"
    counts = np.bincount(mask.ravel(), minlength=256)
    classes = index.pixels.shape[1]
    strange = [value for value in np.flatnonzero(counts).tolist() if value >= classes and value != IGNORE]
    if strange:
        yield f"the mask of {one.id} should hold 0..{classes - 1} and {IGNORE}, but holds {', '.join(map(str, strange))}"
    if not np.array_equal(counts[:classes], index.pixels[row]):
        yield f"the mask of {one.id} has not the pixels per class that the index says"
