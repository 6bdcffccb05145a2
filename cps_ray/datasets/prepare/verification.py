"""Whether shards are still what was written: compares every file, image and mask with manifest and index."""

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


def verify(manifest: Manifest, indexes: Mapping[str, Index]) -> Iterator[tuple[int, list[Finding]]]:
    """Reads everything, in threads, and yields (number of images checked, what is wrong with them), in no certain order.

    All findings are fatal and name a file. The numbers of images add up to those of the indexes.
    """
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        futures: list[Future[tuple[int, list[Finding]]]] = []
        for split, index in indexes.items():
            for number, file in enumerate(manifest.splits[split].files):
                path, rows = index.locations.files[number], np.flatnonzero(index.locations.file == number)
                if not os.access(path, os.R_OK):  # reported once, not for each of its images
                    finding = _damage(path, "the file is missing or cannot be read")
                    futures.append(pool.submit(lambda result: result, (len(rows), [finding])))
                    continue
                # A file's images follow its checksum while it is still in the page cache.
                futures.append(pool.submit(partial(_check_file, path, file)))
                parts = [rows[first : first + _ROWS_AT_ONCE].tolist() for first in range(0, len(rows), _ROWS_AT_ONCE)]
                futures += [pool.submit(partial(_check_rows, index, part)) for part in parts]
        try:
            for future in as_completed(futures):
                yield future.result()
        finally:
            # Also where the caller stops early: leaving the pool would otherwise wait for all that is queued.
            pool.shutdown(cancel_futures=True)


def damage_finding(path: str | Path, error: DataError) -> Finding:
    """Returns as a finding what an error says about a file."""
    return _damage(str(path), _without_remedy(str(error).removeprefix(f"{path}: ")))


def _damage(path: str, found: str) -> Finding:
    return Finding("shards are damaged", path, found, "prepare the data set again")


def _without_remedy(text: str) -> str:
    """Cuts the remedy off a message, because it is the same for all damage."""
    return text.partition(";")[0].removesuffix(".")


def _check_file(path: str, file: ShardFile) -> tuple[int, list[Finding]]:
    """Compares a file's size and checksum with the manifest. Counts no images: `_check_rows` does."""
    try:
        with open(path, "rb") as stream:
            size, digest = os.fstat(stream.fileno()).st_size, hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        return 0, [_damage(path, f"the file cannot be read ({error.strerror})")]
    if size != file.bytes:
        return 0, [_damage(path, f"the file has {size} bytes, but the manifest says {file.bytes}")]
    if digest != file.sha256:
        return 0, [_damage(path, f"the file's sha256 is {digest[:12]}..., but the manifest says {file.sha256[:12]}...")]
    return 0, []


def _check_rows(index: Index, rows: list[int]) -> tuple[int, list[Finding]]:
    return len(rows), list(chain.from_iterable(_check_row(index, row) for row in rows))


def _check_row(index: Index, row: int) -> Iterator[Finding]:
    path = index.locations.files[index.locations.file[row]]
    try:
        encoded = index.locations.read([row])[0]
    except DataError as error:
        yield damage_finding(path, error)
        return
    yield from (_damage(path, problem) for problem in _pixel_problems(index, row, encoded))


def _pixel_problems(index: Index, row: int, encoded: Encoded) -> Iterator[str]:
    """Decodes image and mask, and yields what in their pixels contradicts the index."""
    size = (int(index.height[row]), int(index.width[row]))
    try:
        image = decode_image(encoded.image)
        mask = None if encoded.mask is None else decode_mask(encoded.mask)
    except DataError as error:
        yield f"{encoded.id}: {_without_remedy(str(error))}"
        return
    where = f"of {encoded.id}"
    if image.shape[:2] != size:
        yield f"the image {where} has {image.shape[1]}x{image.shape[0]} px, but the index says {size[1]}x{size[0]}"
    if mask is None:
        return
    if mask.shape != size:
        yield f"the mask {where} has {mask.shape[1]}x{mask.shape[0]} px, but the index says {size[1]}x{size[0]}"
    counts = np.bincount(mask.ravel(), minlength=256)
    num_classes = index.pixels.shape[1]
    unknown = [value for value in np.flatnonzero(counts).tolist() if value >= num_classes and value != IGNORE]
    if unknown:
        listed = ", ".join(map(str, unknown))
        yield f"the mask {where} should hold 0..{num_classes - 1} and {IGNORE}, but holds {listed}"
    if not np.array_equal(counts[:num_classes], index.pixels[row]):
        yield f"the mask {where} has other numbers of pixels per class than the index says"
