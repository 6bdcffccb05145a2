"""Which training images are labelled and which are not."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cps_ray.config.train import DataConfig
from cps_ray.datasets.lists import matcher, read_list
from cps_ray.datasets.shards import Index
from cps_ray.errors import DataError

SUBSETS_FOLDER = "subsets"
_FORMER_FOLDER = "splits"
_CANDIDATES = 16
LABELED_LIST = "labeled.txt"
UNLABELED_LIST = "unlabeled.txt"


@dataclass(frozen=True, slots=True)
class LabeledSubset:
    """Which training images are labelled, and which are used without a mask: rows of the training index, int64, ascending."""

    labeled: NDArray[np.int64]
    unlabeled: NDArray[np.int64]


def labeled_subset(data: DataConfig, index: Index) -> LabeledSubset:
    """Divides the training images as `data` says. Raises DataError when there are too few, or lists do not fit."""
    unlabeled_list = data.unlabeled_list
    if data.labeled_list is not None:
        labeled = read_ids(data.labeled_list, index)
        _refuse_bare(data.labeled_list, labeled, index)
    else:
        assert data.labeled is not None
        labeled = labeled_rows(data.shards, index, data.labeled, data.subset_seed)
        if isinstance(data.labeled, str) and unlabeled_list is None:
            named = subset_folder(data.shards, data.labeled) / UNLABELED_LIST
            unlabeled_list = named if named.exists() else None
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


def subset_folder(shards: Path, name: str) -> Path:
    """Folder of the lists that `python -m cps_ray.subsets` puts beside the shards."""
    return shards / SUBSETS_FOLDER / name


def labeled_rows(shards: Path, index: Index, wanted: int | float | str, seed: int) -> NDArray[np.int64]:
    """Rows of the labelled images: a count, a fraction in (0, 1], or the name of a subset. DataError if there are too few."""
    if isinstance(wanted, str):
        path = subset_folder(shards, wanted) / LABELED_LIST
        if not path.exists():
            former = shards / _FORMER_FOLDER
            if (former / wanted / LABELED_LIST).exists():
                raise DataError(
                    f"{former}: lists of labelled subsets must lie in {SUBSETS_FOLDER}/ now. Move them: mv {former} {shards / SUBSETS_FOLDER}"
                )
            known = sorted(folder.name for folder in subset_folder(shards, "").glob("*") if folder.is_dir())
            raise DataError(
                f"{shards}: no subset named {wanted!r} here; there are {', '.join(known) or 'none'}. "
                f"Bring in published lists, or draw one: python -m cps_ray.subsets --help"
            )
        rows = read_ids(path, index)
        _refuse_bare(path, rows, index)
        return rows
    masked = int(index.labeled.sum())
    count = max(1, round(wanted * masked)) if isinstance(wanted, float) else wanted
    if count > masked:
        raise DataError(
            f"{shards}: data.labeled must be at most {masked}, the training images with a mask, but is {count}."
        )
    return stratified_order(index, seed, count)


def _refuse_bare(path: Path, rows: NDArray[np.int64], index: Index) -> None:
    bare = [index.ids[row] for row in rows if not index.labeled[row]]
    if bare:
        raise DataError(
            f"{path}: every labelled image must have a mask, but {len(bare)} have none, the first is {bare[0]}."
        )


def stratified_order(index: Index, seed: int, count: int) -> NDArray[np.int64]:
    """`count` of the rows that have masks, drawn so that classes appear about as often as in all of them.

    Nested: the first k rows of a longer draw are the draw of k rows. Each pick is the one of 16 random candidates that
    brings the fraction of images per class nearest to the whole set's; rare classes weigh as much as common ones.
    """
    rows = np.flatnonzero(index.labeled)
    rows = np.random.default_rng((seed, 0x5917)).permutation(rows)
    presence = index.presence[rows].astype(np.float64)
    fraction_C = presence.mean(axis=0)  # noqa: N806
    weight_C = np.divide(1.0, fraction_C, out=np.zeros_like(fraction_C), where=fraction_C > 0)  # noqa: N806
    waiting = list(range(len(rows)))
    seen_C = np.zeros_like(fraction_C)  # noqa: N806
    chosen: list[int] = []
    while len(chosen) < count:
        candidates = waiting[:_CANDIDATES]
        gap = seen_C + presence[candidates] - (len(chosen) + 1) * fraction_C
        best = int(np.argmin((weight_C * gap**2).sum(axis=1)))
        chosen.append(waiting.pop(best))
        seen_C += presence[chosen[-1]]  # noqa: N806
    return rows[chosen].astype(np.int64)


def read_ids(path: Path, index: Index) -> NDArray[np.int64]:
    """Rows of the images that a list file names. DataError if one is not there."""
    entries = read_list(path, "Paths are relative to the config file.")
    rows = {name: row for row, name in enumerate(index.ids)}
    match = matcher(index.ids)
    found: dict[int, int] = {}
    for entry, line in entries.items():
        name = match(entry)
        if name is None:
            raise DataError(
                f"{path}:{line}: {entry!r} is no image of the training split, whose ids look like {index.ids[0]!r}."
            )
        if rows[name] in found:
            raise DataError(f"{path}:{line}: {entry!r} is listed twice, first in line {found[rows[name]]}.")
        found[rows[name]] = line
    return np.array(list(found), dtype=np.int64)
