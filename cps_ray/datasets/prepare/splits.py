"""Splits that are drawn from the labelled images of one folder, and stay as they were drawn; lists of folds."""

import hashlib
import math
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cps_ray.datasets.lists import listed_ids, write_list
from cps_ray.datasets.prepare.items import Source
from cps_ray.datasets.prepare.recipe import DRAWN_FROM, Recipe
from cps_ray.datasets.stratified import group_images, next_pick
from cps_ray.errors import DataError
from cps_ray.files import read_json, write_json
from cps_ray.text import first_few

ClassesOf = Callable[[Source], NDArray[np.bool_] | None]
"""Returns which classes the masks of a source show, bool (C,); None where they cannot be used."""
_DRAWN = "drawn.json"
"""File beside the lists that says what they were drawn with."""
_LOOKED_AT = 256
"""Most groups that one pick of a draw looks at, where no class is missing."""
_ATTEMPTS = 10
"""Draws of which the one that covers most classes counts; the first, if it covers all that can be."""


def list_folder(recipe: Path) -> Path:
    """Returns the folder, beside a recipe file, where it is kept which images were drawn for which split."""
    return recipe.with_name(f"{recipe.stem}.splits")


def draw_splits(
    splits: Mapping[str, Sequence[Source]], recipe: Recipe, lists: Path | None, classes_of: ClassesOf
) -> tuple[dict[str, tuple[Source, ...]], list[str]]:
    """Draws the splits that are a fraction from the labelled images of `train`; returns all splits, and what to note.

    Groups stay whole, and every class is shown in each drawn split and in train where that can be. What the lists in the folder
    `lists` name stays where it is; images that are new are drawn among themselves, and the lists grow. Raises DataError if there
    are too few images, or if the lists do not fit the images.
    """
    sources, names = splits[DRAWN_FROM], [DRAWN_FROM, *recipe.fractions]
    group_of = _groups(sources, recipe.group_by, recipe.files[DRAWN_FROM].prefix)
    labeled = [source for source in sources if source.masks]
    listed = {} if lists is None else _read_lists(lists, names, [source.id for source in labeled])
    split_of = listed
    if any(source.id not in listed for source in labeled) or not labeled:
        # A mask that cannot be used is reported when all are read. Once it is right, its image is new.
        shows = _classes(labeled, classes_of)
        if labeled and len(shows) < len(labeled) / 2:
            return {name: tuple(splits.get(name, ())) for name in recipe.splits}, [
                "no splits were drawn, as most masks cannot be used"
            ]
        if not listed:
            _refuse_tiny(recipe, len(shows))
        pool = _Pool.of(list(shows), group_of, shows, listed, names)
        pool.draw(list(recipe.fractions.values()), recipe.draw_seed)
        _refuse_empty(pool, recipe)
        split_of = listed | pool.split_of()
    if lists is not None and len(split_of) > len(listed):
        _write_lists(lists, names, split_of, recipe, is_first=not listed)
    notes = _notes(recipe, lists, listed, split_of, group_of)

    held_out = {group_of[key]: name for key, name in split_of.items() if name != DRAWN_FROM}
    left_out = {source.id for source in sources if not source.masks and group_of[source.id] in held_out}
    if left_out:
        notes.append(
            f"{len(left_out)} unlabelled images are left out of train, as images of their group, or copies of them, are in "
            f"{' or '.join(recipe.fractions)}: {first_few(sorted(left_out))}"
        )
    drawn: dict[str, list[Source]] = {name: [] for name in names}
    for source in sources:
        if source.id not in left_out:
            # One whose mask cannot be used goes with its group: were the mask left out, its photo would be trained on.
            drawn[split_of.get(source.id) or held_out.get(group_of[source.id], DRAWN_FROM)].append(source)
    return {name: tuple(drawn.get(name, splits.get(name, ()))) for name in recipe.splits}, notes


# ------------------------------------------------------------------------------------------------------------ groups


def _groups(sources: Sequence[Source], group_by: str | None, prefix: str) -> dict[str, str]:
    """Returns the group of each image, under the id of one of its images: of those that `group_by` or equal bytes put together.

    Raises DataError if `group_by` matches no id.
    """
    names = {source.id: source.id.removeprefix(prefix) for source in sources}
    return group_images(names, group_by, _copies(sources))


def _copies(sources: Iterable[Source]) -> list[list[str]]:
    """Returns the ids of images whose files are equal, byte for byte, together."""
    by_size: dict[int, list[Source]] = defaultdict(list)
    for source in sources:
        try:
            by_size[os.stat(source.image).st_size].append(source)
        except OSError:
            continue  # reported when all are read

    def digest(source: Source) -> str:
        try:
            with open(source.image, "rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
        except OSError:
            return source.id

    by_content: dict[tuple[int, str], list[str]] = defaultdict(list)
    # Few files have the size of another one, so few are read.
    alike = [(size, source) for size, same in by_size.items() if len(same) > 1 for source in same]
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        digests = threads.map(digest, [source for _, source in alike])
        for (size, source), content in zip(alike, digests, strict=True):
            by_content[size, content].append(source.id)
    return [keys for keys in by_content.values() if len(keys) > 1]


def _classes(sources: Iterable[Source], classes_of: ClassesOf) -> dict[str, NDArray[np.bool_]]:
    """Returns which classes the masks of each labelled image show; those whose masks cannot be used are left out."""
    labeled = [source for source in sources if source.masks]
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        shown = zip(labeled, threads.map(classes_of, labeled), strict=True)
        return {source.id: classes for source, classes in shown if classes is not None}


# ------------------------------------------------------------------------------------------------------------- draws


@dataclass
class _Pool:
    """Groups of labelled images, and the split of each: 0 is train, -1 not yet drawn."""

    names: Sequence[str]
    groups: list[list[str]]
    counts: NDArray[np.float64]
    """(G, C) images of each group that show each class."""
    sizes: NDArray[np.float64]
    """(G,) images of each group."""
    split: NDArray[np.int64]
    """(G,) position in `names`."""

    @classmethod
    def of(
        cls,
        keys: Sequence[str],
        group_of: Mapping[str, str],
        shows: Mapping[str, NDArray[np.bool_]],
        listed: Mapping[str, str],
        names: Sequence[str],
    ) -> "_Pool":
        """Gathers labelled images into groups; a group with an image that is listed is in the split of that one."""
        members: dict[tuple[str, str], list[str]] = {}
        splits_of: dict[str, set[str]] = defaultdict(set)
        for key, name in listed.items():
            splits_of[group_of[key]].add(name)
        for key in keys:
            # Held out goes before train, so that an image that joins is not trained on beside its like in test.
            joined = max(splits_of[group_of[key]], key=names.index, default="")
            members.setdefault((group_of[key], listed.get(key, joined)), []).append(key)
        groups = list(members.values())
        counts = np.array([np.sum([shows[key] for key in group], axis=0) for group in groups], np.float64)
        split = np.array([names.index(name) if name else -1 for _, name in members], np.int64)
        sizes = np.array([len(group) for group in groups], np.float64)
        return cls(names, groups, counts, sizes, split)

    def split_of(self) -> dict[str, str]:
        """Returns the split of each image."""
        return {key: self.names[at] for group, at in zip(self.groups, self.split, strict=True) for key in group}

    def images(self) -> dict[str, int]:
        """Returns the number of images per split."""
        return {name: int(self.sizes[self.split == at].sum()) for at, name in enumerate(self.names)}

    def draw(self, fractions: Sequence[float], seed: int) -> None:
        """Draws the groups that are in no split yet, so that each split but train gets nearer to its fraction of all images."""
        best: tuple[int, float] | None = None
        reachable = int(np.minimum((self.counts > 0).sum(axis=0), len(self.names)).sum()) if len(self.groups) else 0
        before = self.split
        for attempt in range(_ATTEMPTS):
            split = self._attempt(before, np.rint(np.array(fractions) * self.sizes.sum()), seed, attempt)
            covered = sum(int((self.counts[split == at] > 0).any(axis=0).sum()) for at in range(len(self.names)))
            off = sum(abs(self.sizes[split == at + 1].sum() / self.sizes.sum() - f) for at, f in enumerate(fractions))
            if best is None or (covered, -off) > best:
                best, self.split = (covered, -off), split
            if covered == reachable or not (before < 0).any():
                return

    def _attempt(
        self, before: NDArray[np.int64], wanted: NDArray[np.float64], seed: int, attempt: int
    ) -> NDArray[np.int64]:
        """Returns the split of each group after one draw, in which the drawn splits get near to `wanted` (splits - 1,) images."""
        split, shows = before.copy(), self.counts > 0
        free = np.random.default_rng((seed, attempt)).permutation(np.flatnonzero(before < 0))
        left = shows[split <= 0].sum(axis=0)  # groups of each class that train may still get
        fraction = self.counts.sum(axis=0) / self.sizes.sum()
        for at, target in enumerate(wanted, start=1):
            shown, size = self.counts[split == at].sum(axis=0), self.sizes[split == at].sum()
            lack = np.sum([~shows[split == later].any(axis=0) for later in range(at + 1, len(self.names))], axis=0)
            while len(free) > 1 or (len(free) and (split == 0).any()):  # train keeps a group
                fits = free[np.abs(size + self.sizes[free] - target) < abs(size - target)]
                if not len(fits) and not size:  # all groups are larger than the split should be
                    fits = free[self.sizes[free] == self.sizes[free].min()]
                if not ((shown == 0) & (left > 1)).any():  # no rare class is looked for: a part of all is enough
                    fits = fits[:_LOOKED_AT]
                # A class that this split shows already is left to later ones that lack it; one group is left to train.
                rest, absent = left - shows[fits], ~shows[fits]
                spare = [((rest >= least) | absent).all(axis=1) for least in (1 + lack * (shown > 0), 1)]
                # Rather a smaller split than a class that is never learnt, but no empty split.
                allowed = next((fits[spared] for spared in spare if spared.any()), fits[: 0 if size else None])
                if not len(allowed):
                    break
                pick = allowed[next_pick(allowed.tolist(), self.counts, self.sizes, shown, size, fraction)]
                split[pick] = at
                free = free[free != pick]
                left, shown, size = left - shows[pick], shown + self.counts[pick], size + self.sizes[pick]
        return np.where(split < 0, 0, split)


def _refuse_tiny(recipe: Recipe, count: int) -> None:
    """Raises DataError if a fraction of `count` images is none."""
    for name, fraction in recipe.fractions.items():
        if round(fraction * count) < 1:
            remedy = (
                f"write at least {math.ceil(100 / count) / 100:g}, or label more images"
                if count > 2
                else "label more images"
            )
            raise DataError(f"splits.{name}: {fraction:g} of {count} labelled images is none; {remedy}.")


def _refuse_empty(pool: _Pool, recipe: Recipe) -> None:
    """Raises DataError if a split has no image, because there are too few to draw from."""
    empty = [name for name, count in pool.images().items() if not count]
    if not empty:
        return
    count = int(pool.sizes.sum())
    grouped = f" in {len(pool.groups)} groups" if len(pool.groups) < count else ""
    raise DataError(
        f"splits.{empty[0]}: {count} labelled images{grouped} are too few for {', '.join(pool.names)}, which leave none for "
        f"{empty[0]}; label more images{', or group fewer together' if grouped else ''}."
    )


# ------------------------------------------------------------------------------------------------------------- lists


def _read_lists(lists: Path, names: Sequence[str], labeled: Sequence[str]) -> dict[str, str]:
    """Returns the split of each image that is listed; empty if there are no lists yet. DataError if they do not fit."""
    split_of: dict[str, str] = {}
    for path in sorted(lists.glob("*.txt")):
        if path.stem not in names:
            raise DataError(
                f"{path}: these images were drawn for a split that the recipe does not draw; bring back `{path.stem}: FRACTION`, "
                f"or delete {lists} to draw all splits anew."
            )
        remedy = "Bring back the image or its mask, or take its line out of the list."
        for key, line in listed_ids(path, labeled, f"the labelled images of {DRAWN_FROM}", remedy=remedy).items():
            if key in split_of:
                raise DataError(f"{path}:{line}: {key!r} is in {lists / split_of[key]}.txt, too; take it out of one.")
            split_of[key] = path.stem
    return split_of


def _drawn_with(recipe: Recipe) -> dict[str, Any]:
    return {"draw_seed": recipe.draw_seed, "group_by": recipe.group_by, **recipe.fractions}


def _write_lists(
    lists: Path, names: Sequence[str], split_of: Mapping[str, str], recipe: Recipe, is_first: bool
) -> None:
    try:
        lists.mkdir(parents=True, exist_ok=True)
        if is_first:
            write_json(lists / _DRAWN, _drawn_with(recipe))
        # Train comes last: were this stopped in between, what is held out would stay held out.
        for name in reversed(names):
            write_list(lists / f"{name}.txt", sorted(key for key, split in split_of.items() if split == name))
    except OSError as error:
        raise DataError(
            f"{lists}: the lists of what was drawn cannot be written ({error.strerror}); move the recipe to a folder that can be "
            "written to."
        ) from None


def _notes(
    recipe: Recipe,
    lists: Path | None,
    listed: Mapping[str, str],
    split_of: Mapping[str, str],
    group_of: Mapping[str, str],
) -> list[str]:
    """Returns what a person should know of a draw: its counts, and in what it differs from what the recipe says now."""
    counts = ", ".join(f"{name} {count}" for name, count in sorted(Counter(split_of.values()).items(), key=str))
    kept = f", as {lists.name} lists" if lists is not None else ""
    new = f"; {len(split_of) - len(listed)} of them are new" if listed and len(split_of) > len(listed) else ""
    notes = [f"labelled images were drawn for splits{kept}: {counts}{new}"]
    before = read_json(lists / _DRAWN) if lists is not None and listed else None
    if before is not None and before != _drawn_with(recipe):
        was = ", ".join(f"{name}: {value}" for name, value in before.items() if value is not None)
        notes.append(
            f"the splits were drawn with {was}; what is listed stays, and what the recipe says now holds for new images alone. "
            f"To draw all anew, delete {lists}"
        )
    splits_of: dict[str, set[str]] = defaultdict(set)
    for key, name in split_of.items():
        splits_of[group_of[key]].add(name)
    torn = sorted(group for group, found in splits_of.items() if len(found) > 1)
    if torn:
        notes.append(
            f"{len(torn)} groups are in several splits, as they were drawn before `group_by`, or a copy, put them together: "
            f"{first_few(torn)}"
        )
    return notes
