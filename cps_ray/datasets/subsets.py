"""The labelled subset: which training images are used with their mask, which without, and which fold of them is held out."""

import re
import shlex
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cps_ray.config.train import DataConfig, FoldsConfig
from cps_ray.datasets.lists import listed_ids
from cps_ray.datasets.shards import Index
from cps_ray.datasets.stratified import even_folds, group_images, next_pick
from cps_ray.errors import DataError

SUBSETS_FOLDER = "subsets"
_FORMER_FOLDER = "splits"
"""Name that SUBSETS_FOLDER had in earlier versions."""
LABELED_LIST = "labeled.txt"
UNLABELED_LIST = "unlabeled.txt"


@dataclass(frozen=True, slots=True)
class LabeledSubset:
    """Rows of the training index, int64, ascending: those of labelled images, those of images used without a mask, and those of the
    labelled images that are held out for evaluation."""

    labeled: NDArray[np.int64]
    unlabeled: NDArray[np.int64]
    held_out: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))


def labeled_subset(data: DataConfig, index: Index) -> LabeledSubset:
    """Divides the training images as `data` says. DataError if too few have masks, or lists do not fit the images."""
    unlabeled_list = data.unlabeled_list
    if data.labeled_list is not None:
        labeled = read_ids(data.labeled_list, index)
        _refuse_without_masks(data.labeled_list, labeled, index)
    else:
        assert data.labeled is not None
        labeled = labeled_rows(data.shards, index, data.labeled, data.subset_seed)
        # `data.unlabeled_list` goes before the list that the subset's folder may hold.
        if isinstance(data.labeled, str) and unlabeled_list is None:
            subset_list = subset_folder(data.shards, data.labeled) / UNLABELED_LIST
            unlabeled_list = subset_list if subset_list.exists() else None
    if unlabeled_list is not None:
        unlabeled = read_ids(unlabeled_list, index)
        both = np.intersect1d(labeled, unlabeled)
        if both.size:
            raise DataError(
                f"{unlabeled_list}: no image may be labelled and unlabelled, but {both.size} are both, "
                f"the first is {index.ids[both[0]]}."
            )
    else:
        unlabeled = np.setdiff1d(np.arange(len(index)), labeled)
    return LabeledSubset(np.sort(labeled), np.sort(unlabeled))


def hold_out(subset: LabeledSubset, index: Index, folds: FoldsConfig, *, tiled: bool) -> LabeledSubset:
    """Deals the labelled images into folds and takes one out, and the one aside, with the unlabelled images of their groups. `tiled`: ids end in the place of
    a tile, and those of one image belong together. DataError if there are fewer groups than folds."""
    alike: dict[bytes | str, list[str]] = defaultdict(list)
    for image_id, checksum in zip(index.ids, index.pixels_sha256, strict=True):
        alike[checksum.tobytes()].append(image_id)
        if tiled:
            alike[re.sub(r"_y\d+_x\d+$", "", image_id)].append(image_id)
    group_of = group_images({image_id: image_id for image_id in index.ids}, folds.group_by, alike.values())
    groups: dict[str, list[int]] = defaultdict(list)
    # By id, so that neither the order of the shards nor that of splits changes the deal.
    for row in sorted(subset.labeled.tolist(), key=lambda row: index.ids[row]):
        groups[group_of[index.ids[row]]].append(row)
    if len(groups) < folds.count:
        raise DataError(
            f"data.folds: {folds.count} folds need {folds.count} groups of labelled images, but there are {len(groups)}; "
            "label more images or lower data.folds.count."
        )
    counts = np.array([index.presence[rows].sum(axis=0) for rows in groups.values()], np.float64)
    sizes = np.array([len(rows) for rows in groups.values()], np.float64)
    fold_of = dict(zip(groups, even_folds(counts, sizes, folds.count, folds.seed), strict=True))
    fold = np.array([fold_of.get(group_of[image_id], -1) for image_id in index.ids])
    held_out, aside = (np.isin(fold, [] if out is None else [out]) for out in (folds.held_out, folds.aside))
    is_left = ~(held_out | aside)
    labeled, unlabeled = subset.labeled, subset.unlabeled
    return LabeledSubset(labeled[is_left[labeled]], unlabeled[is_left[unlabeled]], labeled[held_out[labeled]])


def drawn_unlabeled(data: DataConfig, unlabeled: NDArray[np.int64], images: int) -> NDArray[np.int64]:
    """Returns those of the unlabelled rows that `data.unlabeled` asks for, ascending; `images`: how many the index has. DataError if there
    are too few."""
    wanted, there = data.unlabeled, len(unlabeled)
    if wanted is None or not there:  # a method that needs some says so itself
        return unlabeled
    count = min(there, max(1, round(wanted * there))) if isinstance(wanted, float) else wanted
    if count > there:
        raise DataError(
            f"{data.shards}: data.unlabeled must be at most {there}, the unlabelled images, but is {count}."
        )
    # Of all rows, so that trainings with other labelled images draw the same ones as far as they can.
    order = np.random.default_rng((data.subset_seed, 0xD4A7)).permutation(images)
    return np.sort(order[np.isin(order, unlabeled)][:count])


def subset_folder(shards: Path, name: str) -> Path:
    """Returns the folder where `python -m cps_ray.subsets` puts the lists of a subset, beside the shards."""
    return shards / SUBSETS_FOLDER / name


def labeled_rows(shards: Path, index: Index, wanted: int | float | str, seed: int) -> NDArray[np.int64]:
    """Returns the rows of the labelled images, int64. `wanted`: a count, a fraction in (0, 1] of the images with a mask, or the
    name of a subset; a count or fraction is drawn with `seed`. DataError if there are too few, or there is no such subset.
    """
    if isinstance(wanted, str):
        path = subset_folder(shards, wanted) / LABELED_LIST
        if not path.exists():
            former = shards / _FORMER_FOLDER
            if (former / wanted / LABELED_LIST).exists():
                folder = shards / SUBSETS_FOLDER
                # `mv splits subsets` would put the one into the other where both are there.
                source, target = (former / wanted, folder / wanted) if folder.exists() else (former, folder)
                raise DataError(
                    f"{former}: lists of labelled subsets must lie in {SUBSETS_FOLDER}/ now. "
                    f"Move them: mv {shlex.quote(str(source))} {shlex.quote(str(target))}"
                )
            names = sorted(folder.name for folder in subset_folder(shards, "").glob("*") if folder.is_dir())
            raise DataError(
                f"{shards}: no subset named {wanted!r} here; there are {', '.join(names) or 'none'}. "
                f"Bring in published lists, or draw one: python -m cps_ray.subsets --help"
            )
        rows = read_ids(path, index)
        _refuse_without_masks(path, rows, index)
        return rows
    num_masks = int(index.labeled.sum())
    # `labeled: 1` is one image and `labeled: 1.0` is all of them: the type says which is meant.
    count = max(1, round(wanted * num_masks)) if isinstance(wanted, float) else wanted
    if count > num_masks:
        raise DataError(
            f"{shards}: data.labeled must be at most {num_masks}, the training images with a mask, but is {count}."
        )
    return stratified_order(index, seed, count)


def named_rows(shards: Path, index: Index, which: str, seed: int) -> NDArray[np.int64]:
    """Returns the rows of the labelled images that the flag `--labeled` names, int64: a count, a fraction, the name of a subset, or a list
    file. Raises DataError if there are no such images."""
    # A subset whose name is a number comes before a count, and before a list file of the same name.
    if subset_folder(shards, which).is_dir():
        return labeled_rows(shards, index, which, seed)
    if Path(which).is_file() or which.endswith(".txt"):
        return read_ids(Path(which), index)
    return labeled_rows(shards, index, _number_or_name(which), seed)


def _number_or_name(text: str) -> int | float | str:
    """Returns a count of at least 1, a fraction in (0, 1], or, if the text is no number, the text: a name.

    Raises DataError for other numbers.
    """
    try:
        value = float(text) if "." in text else int(text)
    except ValueError:
        return text
    if value <= 0 or (isinstance(value, float) and value > 1):
        raise DataError(f"--labeled must be a count of at least 1 or a fraction in (0, 1], but is {text}.")
    return value


def _refuse_without_masks(path: Path, rows: NDArray[np.int64], index: Index) -> None:
    without = [index.ids[row] for row in rows if not index.labeled[row]]
    if without:
        raise DataError(
            f"{path}: every labelled image must have a mask, but {len(without)} have none, the first is {without[0]}."
        )


def stratified_order(index: Index, seed: int, count: int) -> NDArray[np.int64]:
    """Draws `count` of the rows that have masks: int64 (count,). See `next_pick`: rare classes come first, then all in proportion.

    Nested: the first k rows of a longer draw are the draw of k rows. While there are classes that no row shows, each row adds
    one at least.
    """
    rows = np.flatnonzero(index.labeled)
    rows = np.random.default_rng((seed, 0x5917)).permutation(rows)
    presence = index.presence[rows].astype(np.float64)
    sizes, fraction = np.ones(len(rows)), presence.mean(axis=0)
    remaining = list(range(len(rows)))
    shown = np.zeros_like(fraction)
    picked: list[int] = []
    while len(picked) < count:
        # What is not picked stays for the next draw. No pick depends on `count`, hence nested.
        best = next_pick(remaining, presence, sizes, shown, len(picked), fraction)
        picked.append(remaining.pop(best))
        shown += presence[picked[-1]]
    return rows[picked].astype(np.int64)


def read_ids(path: Path, index: Index) -> NDArray[np.int64]:
    """Returns the rows of the images that a list file names, int64, in its order; DataError as `listed_ids` raises it."""
    row_of = {image_id: row for row, image_id in enumerate(index.ids)}
    ids = listed_ids(path, index.ids, "the training split", hint="Paths are relative to the config file.")
    return np.array([row_of[image_id] for image_id in ids], dtype=np.int64)
