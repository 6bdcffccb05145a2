"""The embedded data set: a function of its settings, with every class, drawn once however many processes ask."""

import fcntl
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from cps_ray.config.train import DataConfig, SyntheticConfig
from cps_ray.datasets import synthetic
from cps_ray.datasets.images import decode_image, decode_mask
from cps_ray.datasets.open import open_data
from cps_ray.datasets.prepare.assembly import DataSetPlan, write_shards
from cps_ray.datasets.prepare.items import Source
from cps_ray.datasets.synthetic import CLASSES, draw_scene, write_synthetic
from cps_ray.errors import DataError

SMALL = SyntheticConfig(train=5, val=2, test=2, height_px=32, width_px=48)


def data(shards: Path, drawn: SyntheticConfig | None = SMALL) -> DataConfig:
    return DataConfig(
        shards=shards,
        synthetic=drawn,
        prepare="make it",
        labeled=2,
        crop_px=(32, 32),
        labeled_batch=1,
        unlabeled_batch=1,
    )


@pytest.mark.parametrize(("height", "width"), [(32, 32), (64, 96), (97, 61)])
def test_scene_shapes_and_types(height: int, width: int) -> None:
    image, mask = draw_scene(np.random.default_rng(0), height, width)
    assert (image.shape, image.dtype) == ((height, width, 3), np.uint8)
    assert (mask.shape, mask.dtype) == ((height, width), np.uint8)


def test_scenes_show_every_class_and_leave_none_out() -> None:
    masks = np.stack([draw_scene(np.random.default_rng((0, k)), 64, 96)[1] for k in range(40)])
    fractions = np.bincount(masks.ravel(), minlength=len(CLASSES)) / masks.size
    assert len(fractions) == len(CLASSES)
    assert fractions.min() > 0.02
    assert fractions.max() < 0.5


def test_colours_alone_do_not_show_the_class() -> None:
    """The mean colour of a class varies more from scene to scene than from one class to another."""
    scenes = [draw_scene(np.random.default_rng((1, k)), 64, 96) for k in range(60)]
    means = [
        [image[mask == label].mean(axis=0) for image, mask in scenes if (mask == label).any()] for label in range(7)
    ]
    within = np.mean([np.std(colors, axis=0).mean() for colors in means])
    between = np.std([np.mean(colors, axis=0) for colors in means], axis=0).mean()
    assert within > between


def test_a_scene_depends_on_seed_split_and_index_only(tmp_path: Path) -> None:
    write_synthetic(tmp_path / "a", SMALL)
    write_synthetic(tmp_path / "longer", SMALL.model_copy(update={"train": 7}))
    write_synthetic(tmp_path / "other", SMALL.model_copy(update={"seed": 1}))
    rows = {}
    for name in ("a", "longer", "other"):
        rows[name] = open_data(data(tmp_path / name, None)).index("train").locations.read(range(5))
    assert rows["a"] == rows["longer"]
    assert all(x.image != y.image for x, y in zip(rows["a"], rows["other"], strict=True))
    assert [entry.id for entry in rows["a"][:2]] == ["train_00000", "train_00001"]


def test_what_is_stored_is_what_was_drawn(tmp_path: Path) -> None:
    (found,) = open_data(data(tmp_path / "shards")).index("val").locations.read([1])
    image, mask = draw_scene(np.random.default_rng((SMALL.seed, 1, 1)), 32, 48)
    assert np.array_equal(decode_image(found.image), image)
    assert found.mask is not None
    assert np.array_equal(decode_mask(found.mask), mask)


def test_second_use_does_not_draw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = open_data(data(tmp_path / "shards"))
    monkeypatch.setattr(synthetic, "draw_scene", None)
    assert open_data(data(tmp_path / "shards")) == first
    assert {name: split.images for name, split in first.manifest.splits.items()} == {"train": 5, "val": 2, "test": 2}


def test_other_settings_are_refused(tmp_path: Path) -> None:
    open_data(data(tmp_path / "shards"))
    message = r"shards are \(.*seed=0\), but the config asks for \(.*seed=3\); remove the folder or set `data.shards`"
    with pytest.raises(DataError, match=message):
        open_data(data(tmp_path / "shards", SMALL.model_copy(update={"seed": 3})))


def test_another_data_set_in_the_folder_is_refused(tmp_path: Path) -> None:
    plan = DataSetPlan(
        {"train": [Source("train_00000")]}, synthetic.FromDrawing(SMALL), CLASSES, synthetic.PALETTE, "camvid"
    )
    write_shards(tmp_path / "shards", plan)
    with pytest.raises(DataError, match=r"these shards are \(camvid\)"):
        open_data(data(tmp_path / "shards"))


def test_without_synthetic_the_shards_must_exist(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no shards here .* Make them: make it"):
        open_data(data(tmp_path / "shards", None))


def test_many_at_once_use_one_folder(tmp_path: Path) -> None:
    """Threads use the same lock as processes."""
    shards = tmp_path / "deep/er/shards"
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: open_data(data(shards)), range(4)))
    assert all(shards == found[0] for shards in found)
    assert [path.name for path in shards.parent.iterdir()] == ["shards"]


def test_a_call_that_waited_uses_what_the_first_has_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards, flock = tmp_path / "shards", fcntl.flock

    def overtaken(lock: int, how: int) -> None:
        monkeypatch.setattr(fcntl, "flock", flock)
        write_synthetic(shards, SMALL)
        monkeypatch.setattr(synthetic, "draw_scene", None)
        flock(lock, how)

    monkeypatch.setattr(fcntl, "flock", overtaken)
    assert len(open_data(data(shards)).index("train")) == 5
    assert [path.name for path in tmp_path.iterdir()] == ["shards"]
