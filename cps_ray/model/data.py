"""Prepared data that a model is applied to: whether they fit it, and which of their training images it was trained on with masks."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cps_ray.config.reader import load_train
from cps_ray.datasets.shards import Index, Shards
from cps_ray.datasets.subsets import labeled_subset, named_rows
from cps_ray.errors import ConfigError, DataError
from cps_ray.files import replaced_folder
from cps_ray.model.model import Model


def check_fit(model: Model, shards: Shards, name: Path) -> None:
    """Raises DataError unless the shards, which a message calls `name`, have the model's classes and images as it was trained on."""
    if shards.classes != model.classes:
        raise DataError(
            f"{name}: must have the model's classes in its order, {', '.join(model.classes)}, but has {', '.join(shards.classes)}."
        )
    manifest, description = shards.manifest, model.description
    if (manifest.bands, manifest.value_range) != (description.bands, description.value_range):
        raise DataError(
            f"{name}: must be made with the model's bands {description.bands} and value_range {description.value_range}, "
            f"but was with {manifest.bands} and {manifest.value_range}. Prepare it with those of the model."
        )


def is_trained_on(model: Model, shards: Shards) -> bool:
    """Returns whether the training split is the model's own, by its fingerprint."""
    train = shards.manifest.splits.get("train")
    return train is not None and (model.description.fingerprint or {}).get("train") == train.fingerprint


def trained_splits(model: Model) -> tuple[str, ...]:
    """Returns the splits that the model was trained on, as far as its config can be read."""
    with suppress(ConfigError):
        return "train", *load_train(model.folder / "config.yaml").data.further_labeled
    return ("train",)


def labeled_rows_of(
    model: Model, shards: Shards, index: Index, which: str | None = None, seed: int = 0
) -> tuple[NDArray[np.int64], str]:
    """Returns the rows of the labelled images of the training split, and in words which these are.

    Those that `which` names as `--labeled` does; else those of the model's own training, if it was trained on these shards; else all
    that have a mask. Raises DataError where the training's list is gone.
    """
    if which is not None:
        rows, words = named_rows(shards.folder, index, which, seed), f"--labeled {which}"
        without = [index.ids[row] for row in rows if not index.labeled[row]]
        if without:
            raise DataError(f"--labeled {which}: every labelled image must have a mask, but {without[0]} has none.")
        return np.sort(rows), words
    if not is_trained_on(model, shards):
        return np.flatnonzero(index.labeled), "all that have a mask"
    try:
        data = load_train(model.folder / "config.yaml").data.model_copy(update={"shards": shards.folder})
        return labeled_subset(data, index).labeled, "those of the model's training"
    except (ConfigError, DataError) as err:
        reason = str(err).splitlines()[0]
        raise DataError(
            f"{model.folder}: which images it was trained on with masks cannot be told ({reason}). Say it: --labeled WHICH"
        ) from err


def check_new(folder: Path) -> None:
    """Raises DataError if there is anything at `folder` but an empty folder, or if no other folder can take its place."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise DataError(f"{folder}: must not hold anything yet, but does; remove it or name another folder.")
    target = Path(os.path.abspath(folder))
    if target == Path.cwd() or target.is_symlink() or os.path.ismount(target):
        raise DataError(f"{folder}: must not be the working directory, a link or a mount point; name a folder in it.")
    there = next(parent for parent in target.parents if parent.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise DataError(f"{folder}: cannot be written, since {there} cannot; name another folder.")


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Gives a folder to write into, which becomes `folder` when the block ends well; else nothing is left. Raises as `check_new` does."""
    check_new(folder)
    try:
        with replaced_folder(Path(os.path.abspath(folder))) as unfinished:
            yield unfinished
    except OSError as err:
        raise DataError(f"{folder}: cannot be written ({err.strerror or err}).") from err
