"""The shards that a config names, whether they were prepared or are to be drawn, and whether they are still the same data."""

from collections.abc import Collection
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from cps_ray.config.train import DataConfig
from cps_ray.datasets.shards import MANIFEST, Shards, fingerprint_of, image_hashes, open_shards
from cps_ray.datasets.synthetic import made_by, write_synthetic
from cps_ray.errors import DataError
from cps_ray.files import write_whole

HASHES_FILE = "data.parquet"
"""Name of the file with the hash of every image that a sweep or a training began with, in its folder."""
_HASHES_SCHEMA = pa.schema([("split", pa.string()), ("id", pa.string()), ("hash", pa.binary(8))])


def open_data(
    data: DataConfig,
    splits: Collection[str] | None = ("train", "val"),
    *,
    hashes_in: Path | None = None,
    setting: str = "",
) -> Shards:
    """Opens the shards of a config; synthetic ones are drawn on first use.

    Several processes may do so at once: one of them puts its folder in place, and the others use that one. DataError if the
    shards are missing, were drawn with other settings, or have other `splits` (None: all) or further labelled ones than `data.fingerprint`
    says. Where the
    folder `hashes_in` has the HASHES_FILE of that fingerprint, the message counts the images that differ; it names `setting`, the
    setting by which the command can be told not to compare.
    """
    shards = _open(data)
    if data.fingerprint is not None:
        # Val may not be there where there are folds; where it is, it must not go unchecked.
        unchecked = [
            each for each in ("train", "val") if each in shards.manifest.splits and each not in data.fingerprint
        ]
        if unchecked:
            raise DataError(
                f"{shards.folder}: `data.fingerprint` must have that of {unchecked[0]}, too, or be null for no check."
            )
    for split, before in (data.fingerprint or {}).items():
        if (splits is None or split in (*splits, *data.further_labeled)) and fingerprints(shards).get(split) != before:
            way_out = f" Go on with them all the same: --set {setting}=null" if setting else ""
            difference = _difference(shards, split, before, hashes_in)
            raise DataError(f"{shards.folder}: other data than in `data.fingerprint`: {difference}.{way_out}")
    return shards


def _open(data: DataConfig) -> Shards:
    if data.synthetic is None:
        return open_shards(data.shards, data.prepare)
    if not data.shards.exists():
        try:
            write_synthetic(data.shards, data.synthetic)
        except DataError:
            if not (data.shards / MANIFEST).exists():  # else another process was faster
                raise
    shards = open_shards(data.shards, data.prepare)
    found, wanted = shards.manifest.made_by.format, made_by(data.synthetic)
    if found != wanted:
        raise DataError(
            f"{data.shards}: these shards are ({found}), but the config asks for ({wanted}); "
            "remove the folder or set `data.shards` to another one."
        )
    return shards


def fingerprints(shards: Shards) -> dict[str, str]:
    """Returns the fingerprint of each split, as `data.fingerprint` has it."""
    return {name: split.fingerprint for name, split in shards.manifest.splits.items()}


def write_image_hashes(folder: Path, shards: Shards) -> None:
    """Writes HASHES_FILE, so that what differs later can be counted."""
    rows = [
        {"split": split, "id": image_id, "hash": value}
        for split in shards.manifest.splits
        for image_id, value in image_hashes(shards.index(split)).items()
    ]
    table = pa.Table.from_pylist(rows, _HASHES_SCHEMA)
    write_whole(folder / HASHES_FILE, lambda path: pq.write_table(table, path))


def _read_image_hashes(folder: Path, split: str) -> dict[str, bytes]:
    """Returns the hashes of a split; none if the folder has no HASHES_FILE that can be read: only the message is shorter then."""
    try:
        # Read, then parsed: given a path, Arrow would take `%` and the like for parts of a URL.
        table = pq.read_table(pa.BufferReader((folder / HASHES_FILE).read_bytes()))
        return {row["id"]: row["hash"] for row in table.to_pylist() if row["split"] == split}
    except (OSError, KeyError, pa.ArrowException):
        return {}


def _difference(shards: Shards, split: str, before: str, folder: Path | None) -> str:
    """Says how a split differs from the one with the fingerprint `before`."""
    count_before = before.partition("-")[0]
    if split not in shards.manifest.splits:
        return f"{split} had {count_before} images and is gone"
    known = _read_image_hashes(folder, split) if folder else {}
    if fingerprint_of(known) != before:  # not known, or of other data
        count = str(shards.manifest.splits[split].images)
        return f"{split} had {count_before} images, has {count}" + (
            " and not the same" if count == count_before else ""
        )
    hashes = image_hashes(shards.index(split))
    added, gone = len(hashes.keys() - known.keys()), len(known.keys() - hashes.keys())
    changed = sum(hashes[image_id] != known[image_id] for image_id in hashes.keys() & known.keys())
    return f"{split} differs in {added + gone + changed} image(s): {added} added, {gone} gone, {changed} changed"
