"""Pseudo labels in shards: confident pixels only, in training images without a label only, and everything else as it was."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support import changed, without_a_cluster

from cps_ray.config.train import TrainConfig
from cps_ray.datasets import shards as shards_module
from cps_ray.datasets.images import decode_image, decode_mask
from cps_ray.datasets.shards import Index, Shards, open_shards
from cps_ray.datasets.subsets import labeled_rows
from cps_ray.engine.batch import IGNORE
from cps_ray.errors import DataError
from cps_ray.model import pseudolabeling
from cps_ray.model.data import labeled_rows_of
from cps_ray.model.model import Model, load_model
from cps_ray.model.pseudolabeling import KeptPixels, keeping_thresholds, write_pseudo_labels

THRESHOLDS = np.array([0.45, 0.25, 0.4, 0.9, 0.17, 0.16, 0.2])
"""Networks that have hardly learnt are sure of little."""


@pytest.fixture(scope="module")
def model(taught: Path) -> Model:
    return load_model(taught, device="cpu", network="ensemble")


@pytest.fixture(scope="module")
def own(pair: TrainConfig) -> Shards:
    return open_shards(pair.data.shards)


@pytest.fixture(scope="module")
def labeled(model: Model, own: Shards) -> np.ndarray:
    return labeled_rows_of(model, own, own.index("train"))[0]


@pytest.fixture(scope="module")
def written(
    model: Model, own: Shards, labeled: np.ndarray, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Shards, KeptPixels]:
    out = tmp_path_factory.mktemp("pseudo") / "shards"
    manifest, kept = write_pseudo_labels(out, model, own, labeled, THRESHOLDS, rule="so and so")
    assert open_shards(out).manifest == manifest.signed()
    assert {path.name for path in out.parent.iterdir()} == {"shards"}
    return open_shards(out), kept


def masks_of(index: Index) -> dict[str, np.ndarray | None]:
    read = index.locations.read(range(len(index)))
    return {each.id: None if each.mask is None else decode_mask(each.mask) for each in read}


def test_the_labelled_images_are_the_trainings(model: Model, own: Shards, labeled: np.ndarray) -> None:
    index = own.index("train")
    assert labeled.tolist() == sorted(labeled_rows(own.folder, index, 6, 0).tolist())
    assert labeled_rows_of(model, own, index)[1] == "those of the model's training"
    assert labeled_rows_of(model, own, index, "0.5")[0].tolist() == sorted(labeled_rows(own.folder, index, 0.5, 0))
    splits = own.manifest.splits
    other = own.manifest.model_copy(update={"splits": {**splits, "train": splits["val"]}})
    rows, words = labeled_rows_of(model, replace(own, manifest=other), index)
    assert (len(rows), words) == (24, "all that have a mask")


def test_labelled_images_keep_their_mask_and_other_splits_all(
    own: Shards, labeled: np.ndarray, written: tuple[Shards, KeptPixels]
) -> None:
    new = written[0]
    for split in ("val", "test"):
        assert new.manifest.splits[split].fingerprint == own.manifest.splits[split].fingerprint
    before, after = own.index("train"), new.index("train")
    assert after.ids == before.ids
    assert np.array_equal(after.locations.image_sha256, before.locations.image_sha256)
    assert np.array_equal(after.pixels_sha256, before.pixels_sha256)
    assert np.array_equal(after.perceptual_hash, before.perceptual_hash)
    old, found = masks_of(before), masks_of(after)
    for row in labeled:
        assert np.array_equal(found[before.ids[row]], old[before.ids[row]])  # type: ignore[arg-type]
    assert (new.classes, new.manifest.palette, new.manifest.bands) == (own.classes, own.manifest.palette, None)


def test_the_others_have_what_the_model_is_sure_of(
    model: Model, own: Shards, labeled: np.ndarray, written: tuple[Shards, KeptPixels]
) -> None:
    new, kept = written
    index, found = new.index("train"), masks_of(new.index("train"))
    hidden, predicted, right = masks_of(own.index("train")), np.zeros(7, int), np.zeros(7, int)
    for row in np.setdiff1d(np.arange(24), labeled):
        name = index.ids[row]
        (encoded,) = index.locations.read([row], masks=False)
        prob = model.probabilities(decode_image(encoded.image))
        label = prob.argmax(-1)
        predicted += np.bincount(label.ravel(), minlength=7)
        expected = np.where(prob.max(-1) >= THRESHOLDS[label].astype(np.float32), label, IGNORE)
        mask = found[name]
        if mask is None:
            assert (expected == IGNORE).all()
            continue
        assert (mask != expected).mean() < 0.002, "single precision"
        assert index.pixels[row].tolist() == np.bincount(mask.ravel(), minlength=256)[:7].tolist()
        right += np.bincount(mask[mask == hidden[name]], minlength=256)[:7]
    unlabeled = np.setdiff1d(np.arange(24), labeled)
    assert kept.kept.tolist() == index.pixels[unlabeled].sum(0).tolist()
    assert 0 < kept.kept.sum() < 0.9 * kept.predicted.sum()
    assert kept.predicted == pytest.approx(predicted, abs=30)
    assert kept.right.tolist() == right.tolist()
    assert kept.checked.tolist() == kept.kept.tolist(), "all pixels of the drawn scenes are known"


def test_the_manifest_says_what_is_not_true(labeled: np.ndarray, written: tuple[Shards, KeptPixels]) -> None:
    new, _ = written
    text = "\n".join(new.manifest.notes)
    number = int(new.index("train").labeled.sum()) - len(labeled)
    assert number > 9
    assert f"{number} training masks are predicted by network ensemble of model best (weights " in text
    assert "not made by people, kept where so and so" in text
    assert "person " in text
    assert "pseudo labels" in new.manifest.made_by.format
    index = new.index("train")
    assert labeled_rows(new.folder, index, "true-masks", 0).tolist() == labeled.tolist()


def test_images_of_which_nothing_is_sure_have_no_mask(
    model: Model, own: Shards, labeled: np.ndarray, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()  # an empty folder may be there
    _, kept = write_pseudo_labels(out, model, own, labeled, np.full(7, 0.999), rule="")
    assert np.flatnonzero(open_shards(out).index("train").labeled).tolist() == labeled.tolist()
    assert not kept.kept.any()


@pytest.mark.parametrize("fraction", [0.3, 1.0])
def test_a_fraction_of_each_class_is_kept(
    model: Model, own: Shards, labeled: np.ndarray, tmp_path: Path, fraction: float
) -> None:
    index, done = own.index("train"), list[int]()
    unlabeled = np.setdiff1d(np.arange(24), labeled)
    thresholds = keeping_thresholds(model, index, unlabeled, fraction, done.append)
    assert sum(done) == 18
    _, kept = write_pseudo_labels(tmp_path / "out", model, own, labeled, thresholds, rule="")
    for label in np.flatnonzero(kept.predicted > 500):
        # All pixels of a thousandth are kept or none: never fewer than were asked for.
        assert fraction <= kept.kept[label] / kept.predicted[label] < fraction + 0.1


def test_a_training_learns_from_them(tiny: TrainConfig, written: tuple[Shards, KeptPixels]) -> None:
    changes = {"method": "supervised", "data__labeled": 1.0, "data__shards": str(written[0].folder)}
    (*_, last) = without_a_cluster(changed(tiny, **changes))
    assert np.isfinite(last["train/loss"])


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError("disk")])
def test_what_is_stopped_leaves_nothing(
    model: Model,
    own: Shards,
    labeled: np.ndarray,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
) -> None:
    def stop(*_: object) -> None:
        raise error

    monkeypatch.setattr(pseudolabeling, "write_list", stop)
    with pytest.raises((KeyboardInterrupt, DataError)):
        write_pseudo_labels(tmp_path / "out", model, own, labeled, THRESHOLDS, rule="")
    assert not [*tmp_path.iterdir()]


def test_a_folder_that_holds_something_stays(model: Model, own: Shards, labeled: np.ndarray, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(DataError, match="must not hold anything yet"):
        write_pseudo_labels(tmp_path, model, own, labeled, THRESHOLDS, rule="")
    assert (tmp_path / "mine.txt").read_text() == "mine"


def test_how_images_were_read_stays(model: Model, own: Shards, labeled: np.ndarray, tmp_path: Path) -> None:
    manifest = json.loads((own.folder / "manifest.json").read_text())
    manifest |= {"bands": [3, 2, 1], "value_range": [0.0, 4095.0], "notes": ["said before"]}
    changed_manifest = shards_module.Manifest.model_validate_json(json.dumps(manifest))
    out, _ = write_pseudo_labels(
        tmp_path / "out", model, replace(own, manifest=changed_manifest), labeled, THRESHOLDS, rule=""
    )
    assert (out.bands, out.value_range) == ((3, 2, 1), (0.0, 4095.0))
    assert out.notes[0] == "said before"
