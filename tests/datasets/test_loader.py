"""Batches are a function of (config, step, batch shard): on any number of batch shards, and from any step."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from support import changed
from trees import pair, plan

from cps_ray.config.train import HELD_OUT, TrainConfig
from cps_ray.datasets.loader import (
    TrainData,
    check_data,
    eval_batches,
    evaluated_images,
    evaluated_sizes,
    hidden_batches,
    metrics_of,
    read_unlabeled,
    train_batches,
    train_data,
    unlabeled_positions,
)
from cps_ray.datasets.prepare.assembly import write_shards
from cps_ray.datasets.shards import Encoded, Shards, open_shards
from cps_ray.engine.batch import IGNORE, Batch
from cps_ray.errors import ConfigError, DataError


def same(a: Batch, b: Batch) -> bool:
    assert a.unlabeled_image is not None
    assert b.unlabeled_image is not None
    pairs = (
        (a.labeled_image, b.labeled_image),
        (a.labeled_mask, b.labeled_mask),
        (a.unlabeled_image, b.unlabeled_image),
    )
    return all(torch.equal(x, y) for x, y in pairs)


def test_batches_keep_the_contract(tiny: TrainConfig) -> None:
    batches = list(train_batches(train_data(open_shards(tiny.data.shards), tiny), tiny))
    assert len(batches) == tiny.schedule.steps
    for batch in batches:
        assert batch.labeled_image.shape == (4, 3, 32, 48)
        assert batch.labeled_mask.shape == (4, 32, 48)
        assert batch.unlabeled_image is not None
        assert batch.unlabeled_image.shape == (4, 3, 32, 48)
        assert batch.labeled_image.dtype == batch.labeled_mask.dtype == batch.unlabeled_image.dtype == torch.uint8


def test_two_batch_shards_make_the_batches_of_one(tiny: TrainConfig) -> None:
    data = train_data(open_shards(tiny.data.shards), tiny)
    batches = list(train_batches(data, tiny))
    halves = [list(train_batches(data, tiny, batch_shard=shard, num_batch_shards=2, threads=1)) for shard in range(2)]
    for batch, a, b in zip(batches, *halves, strict=True):
        assert a.unlabeled_image is not None
        assert b.unlabeled_image is not None
        joined = Batch(
            torch.cat([a.labeled_image, b.labeled_image]),
            torch.cat([a.labeled_mask, b.labeled_mask]),
            torch.cat([a.unlabeled_image, b.unlabeled_image]),
        )
        assert same(batch, joined)


@pytest.mark.parametrize(
    "changes",
    [
        {"method": "fixmatch"},
        {"method": "mean_teacher", "ema__decay": 0.9},
        {"cps__cutmix_partner": "self"},
        {"cps__student": "strong"},
    ],
    ids=["fixmatch", "mean_teacher", "cutmix of the same image", "strong students"],
)
def test_a_second_view_comes_where_the_method_asks_for_one(tiny: TrainConfig, changes: dict[str, str]) -> None:
    config = changed(tiny, **changes)
    data = train_data(open_shards(config.data.shards), config)
    plain = list(train_batches(train_data(open_shards(tiny.data.shards), tiny), tiny))
    batches = list(train_batches(data, config))
    assert all(batch.unlabeled_second is None for batch in plain)
    differing = 0
    for batch, without in zip(batches, plain, strict=True):
        assert torch.equal(batch.unlabeled_image, without.unlabeled_image)
        assert torch.equal(batch.labeled_image, without.labeled_image)
        for view, second in zip(batch.unlabeled_image, batch.unlabeled_second, strict=True):
            differing += not torch.equal(view, second)
    assert differing > 20  # of 24
    second_half = list(train_batches(data, config, batch_shard=1, num_batch_shards=2, start_step=3))
    assert torch.equal(second_half[0].unlabeled_second, batches[3].unlabeled_second[2:])


@pytest.mark.parametrize(
    "changes",
    [{"method": "unimatch"}, {"method": "fixmatch", "fixmatch__strong_views": 2}],
    ids=["unimatch", "fixmatch"],
)
def test_two_strong_views_differ_and_show_the_same_place(tiny: TrainConfig, changes: dict[str, str]) -> None:
    config = changed(tiny, **changes)
    one = list(train_batches(train_data(open_shards(tiny.data.shards), tiny), changed(tiny, method="fixmatch")))
    batches = list(train_batches(train_data(open_shards(config.data.shards), config), config))
    differing = 0
    for batch, without in zip(batches, one, strict=True):
        assert torch.equal(batch.unlabeled_image, without.unlabeled_image)
        assert torch.equal(batch.unlabeled_second, without.unlabeled_second)
        assert without.unlabeled_third is None
        assert batch.second_box is None
        differing += sum(
            not torch.equal(view, third)
            for view, third in zip(batch.unlabeled_second, batch.unlabeled_third, strict=True)
        )
    assert differing > 20  # of 24


def test_self_training_has_weak_views_alone(tiny: TrainConfig) -> None:
    config = changed(tiny, method="fixmatch", fixmatch__view="weak")
    batch = next(iter(train_batches(train_data(open_shards(config.data.shards), config), config)))
    assert batch.unlabeled_image is not None
    assert batch.unlabeled_second is None


def test_boxes_say_where_views_are_padding(tiny: TrainConfig) -> None:
    config = changed(tiny, augment__scale=(0.3, 1.0), cps__cutmix_partner="self")
    data = train_data(open_shards(config.data.shards), config)
    mean = torch.tensor([124, 116, 104], dtype=torch.uint8).view(3, 1, 1)
    for batch in train_batches(data, config):
        for (top, bottom, left, right), mask in zip(batch.labeled_box.tolist(), batch.labeled_mask, strict=True):
            inside = torch.zeros_like(mask, dtype=torch.bool)
            inside[top:bottom, left:right] = True
            assert torch.equal(inside, mask != IGNORE)  # the drawn scenes ignore nothing else
        for views, boxes in (
            (batch.unlabeled_image, batch.unlabeled_box),
            (batch.unlabeled_second, batch.second_box),
        ):
            for view, (top, bottom, left, right) in zip(views, boxes.tolist(), strict=True):
                around = torch.ones(view.shape[1:], dtype=torch.bool)
                around[top:bottom, left:right] = False
                assert around.any()
                assert (view == mean).all(dim=0)[around].all()
                assert (view == mean).all(dim=0)[~around].float().mean() < 0.2


def test_images_of_rare_classes_come_up_more_often(tiny: TrainConfig) -> None:
    config = changed(tiny, data__labeled=1.0, method="supervised")
    data = train_data(open_shards(config.data.shards), config)
    presence = data.index.presence[data.subset.labeled].astype(bool)
    fractions = presence.mean(axis=0)
    threshold = 1.0  # the rarest class of the tiny scenes is in seven of eight
    repeats = np.bincount(data.repeats(threshold), minlength=len(presence))
    expected = [max(max(1.0, math.sqrt(threshold / fractions[c])) for c in np.flatnonzero(row)) for row in presence]
    assert np.abs(repeats - expected).max() < 1.0
    assert repeats.sum() == int(sum(expected) + 1e-9)
    assert repeats.min() == 1 < repeats.max()
    assert (data.repeats(0.0) == np.arange(len(presence))).all()
    batches = zip(
        train_batches(data, config), train_batches(data, changed(config, augment__repeat_threshold=1.0)), strict=True
    )
    assert any(not torch.equal(a.labeled_mask, b.labeled_mask) for a, b in batches)


@pytest.mark.parametrize("section", ["loss", "cps", "fixmatch", "unimatch"])
def test_class_weights_must_be_as_many_as_classes(tiny: TrainConfig, section: str) -> None:
    shards = open_shards(tiny.data.shards)
    config = changed(tiny, **{f"{section}__class_weights": [1.0] * (len(shards.classes) - 1)})
    with pytest.raises(DataError, match=rf"^{section}.class_weights: must have one weight for each of the .* but has"):
        check_data(shards, config)


def test_a_power_weighs_classes_by_the_labelled_images(tiny: TrainConfig) -> None:
    config = changed(tiny, method="cps", loss__class_weights=0.5, cps__class_weights=1.0)
    shards = open_shards(tiny.data.shards)
    check_data(shards, config)
    data = train_data(shards, config)
    pixels = data.index.pixels[data.subset.labeled].sum(axis=0)
    assert (pixels != data.index.pixels.sum(axis=0)).any()
    for section, power in (("loss", 0.5), ("cps", 1.0)):
        weights = np.array(data.weigh(config).class_weights[section])
        assert weights @ pixels == pytest.approx(pixels.sum())
        assert weights * pixels**power == pytest.approx(weights[0] * pixels[0] ** power)
    assert config.loss.class_weights == 0.5  # what is written down stays as it was


def test_a_class_that_no_labelled_image_shows_weighs_as_much_as_the_rarest(tiny: TrainConfig) -> None:
    config = changed(tiny, loss__class_weights=0.5)
    assert config.weighed([0, 4, 16]).loss.class_weights == pytest.approx((20 / 12, 20 / 12, 10 / 12))
    assert config.weighed([0, 0, 0]).loss.class_weights == (1.0, 1.0, 1.0)


def test_weights_of_which_none_counts_are_refused(tiny: TrainConfig) -> None:
    with pytest.raises(ConfigError, match=r"loss\.class_weights: must have a weight above 0, but all are 0"):
        changed(tiny, loss__class_weights=[0.0] * 7)
    with pytest.raises(ConfigError, match=r"loss\.class_weights: "):
        changed(tiny, loss__class_weights=1.5)


def test_hidden_masks_are_those_of_unlabelled_images(tiny: TrainConfig) -> None:
    data = train_data(open_shards(tiny.data.shards), tiny)
    ids = lambda config, **shard: [  # noqa: E731
        image_id for batch in hidden_batches(data, config.evaluation.hidden_images, **shard) for image_id in batch.ids
    ]
    unlabeled = {data.index.ids[row] for row in data.subset.unlabeled}
    assert set(ids(tiny)) == unlabeled
    few = changed(tiny, evaluation__hidden_images=5)
    assert len(set(ids(few))) == 5
    assert sorted(
        [*ids(few, batch_shard=0, num_batch_shards=2), *ids(few, batch_shard=1, num_batch_shards=2)]
    ) == sorted(ids(few))
    assert ids(changed(tiny, evaluation__hidden_images=0)) == []


def test_starting_late_gives_the_later_batches(tiny: TrainConfig) -> None:
    data = train_data(open_shards(tiny.data.shards), tiny)
    batches = list(train_batches(data, tiny))
    late = list(train_batches(data, tiny, start_step=4))
    assert all(same(a, b) for a, b in zip(batches[4:], late, strict=True))


def test_labelled_images_never_come_unlabelled(tiny: TrainConfig) -> None:
    data = train_data(open_shards(tiny.data.shards), tiny)
    seen = {encoded.id for encoded in read_unlabeled(data, tiny, unlabeled_positions(tiny, 0, 1, 0))}
    assert len(seen) == 18  # 24 positions, a pass of 18 images and more
    assert not seen & {data.index.ids[row] for row in data.subset.labeled}


def test_an_error_of_the_stream_reaches_the_training(tiny: TrainConfig) -> None:
    data = train_data(open_shards(tiny.data.shards), tiny)

    def broken():
        yield from list(read_unlabeled(data, tiny, unlabeled_positions(tiny, 0, 1, 0)))[:8]
        raise DataError("row 9 is damaged")

    with pytest.raises(DataError, match="row 9 is damaged"):
        list(train_batches(data, tiny, unlabeled=broken()))


def test_a_stream_that_ends_early_says_so(tiny: TrainConfig) -> None:
    data = train_data(open_shards(tiny.data.shards), tiny)
    images = list(read_unlabeled(data, tiny, unlabeled_positions(tiny, 0, 1, 0)))
    batches = train_batches(data, tiny, unlabeled=iter(images[:10]))
    assert len([next(batches), next(batches)]) == 2  # those before it are trained on
    with pytest.raises(DataError, match="for all 6 steps of the training, but it ended in step 2 after 2 of 4 images"):
        next(batches)


def test_a_damaged_image_reaches_the_training(tiny: TrainConfig) -> None:
    data = train_data(open_shards(tiny.data.shards), tiny)
    broken = (Encoded("x", b"no image", None) for _ in range(1000))
    with pytest.raises(DataError, match="cannot be decoded"):
        list(train_batches(data, tiny, unlabeled=broken))


def test_supervised_reads_no_unlabelled_image(tiny: TrainConfig) -> None:
    config = changed(tiny, method="supervised")
    (first, *_) = train_batches(train_data(open_shards(config.data.shards), config), config)
    assert first.unlabeled_image is None


def test_all_labelled_leaves_cps_nothing(tiny: TrainConfig) -> None:
    config = changed(tiny, data__labeled=24)
    with pytest.raises(DataError, match="needs unlabelled images, but all 24 training images are labelled"):
        train_data(open_shards(config.data.shards), config)


@pytest.mark.parametrize("num_batch_shards", [1, 2, 4, 7])
def test_evaluation_sees_every_image_once(shards: Path, num_batch_shards: int) -> None:
    ids = [
        image_id
        for shard in range(num_batch_shards)
        for batch in eval_batches(
            open_shards(shards), "val", batch_shard=shard, num_batch_shards=num_batch_shards, size_px=2 * 32 * 48
        )
        for image_id in batch.ids
    ]
    assert sorted(ids) == [f"val_{n:05d}" for n in range(6)]


SIZES = [(40, 30), (20, 20), (30, 40), (100, 100), (20, 20), (40, 30), (20, 20), (30, 40), (20, 20), (1, 2000)]


@pytest.fixture
def many_sizes(tmp_path: Path) -> Shards:
    """A split of images of the SIZES; the images' numbers are those of the list."""
    sources = [pair(tmp_path, f"{number:02d}", size=size) for number, size in enumerate(SIZES)]
    write_shards(tmp_path / "shards", plan({"val": sources}))
    return open_shards(tmp_path / "shards")


def eval_ids(shards: Shards, size_px: int, shard: int = 0, num_batch_shards: int = 1) -> list[list[int]]:
    return [
        [int(image_id) for image_id in batch.ids]
        for batch in eval_batches(
            shards, "val", batch_shard=shard, num_batch_shards=num_batch_shards, size_px=size_px, threads=1
        )
    ]


def test_images_of_one_size_are_evaluated_together_wherever_they_lie(many_sizes: Shards) -> None:
    # The largest first; 2400 pixels are two of 40x30, six of 20x20, and one that is larger on its own.
    assert eval_ids(many_sizes, 2400) == [[3], [9], [0, 5], [2, 7], [1, 4, 6, 8]]
    assert eval_ids(many_sizes, 1200) == [[3], [9], [0], [5], [2], [7], [1, 4, 6], [8]]


def test_batch_shards_have_about_as_many_pixels(many_sizes: Shards) -> None:
    parts = [eval_ids(many_sizes, 2400, shard, 2) for shard in range(2)]
    assert parts == [[[3], [0], [2], [1, 6]], [[9], [5], [7], [4, 8]]]


def test_the_embedded_data_is_fit_for_use(tiny: TrainConfig) -> None:
    check_data(open_shards(tiny.data.shards), tiny)


def test_padding_has_the_colour_that_is_asked_for(tiny: TrainConfig) -> None:
    config = changed(tiny, data__crop_px=[96, 96], augment__scale=[0.5, 0.5])
    data = train_data(open_shards(tiny.data.shards), config)
    (first, *_) = train_batches(data, config, fill=(1, 2, 3))
    for image in (first.labeled_image, first.unlabeled_image):
        assert image is not None
        assert image[:, :, 0, 0].tolist() == [[1, 2, 3]] * len(image)


def ids_of(data: TrainData, part: str) -> set[str]:
    return {data.index.ids[row] for row in getattr(data.subset, part)}


def test_further_splits_are_labelled_as_a_whole(tiny: TrainConfig) -> None:
    shards, config = open_shards(tiny.data.shards), changed(tiny, data__further_labeled=["val"])
    plain, data = train_data(shards, tiny), train_data(shards, config)
    assert ids_of(data, "labeled") == ids_of(plain, "labeled") | {f"val_{n:05d}" for n in range(6)}
    assert ids_of(data, "unlabeled") == ids_of(plain, "unlabeled")
    read = dict(zip(data.labeled.ids, data.labeled.read(range(12)), strict=True))
    (true,) = shards.index("val").locations.read([4])
    assert read["val_00004"] == true
    assert next(iter(train_batches(data, config))).labeled_image.shape == (4, 3, 32, 48)


@pytest.mark.parametrize("further", [[], ["val", "test"]])
def test_a_held_out_fold_is_evaluated_and_seen_nowhere_else(tiny: TrainConfig, further: list[str]) -> None:
    shards, everything = open_shards(tiny.data.shards), changed(tiny, data__further_labeled=further)
    labeled, found = ids_of(train_data(shards, everything), "labeled"), []
    for number in range(3):
        config = changed(everything, data__folds={"count": 3, "held_out": number})
        data, evaluated = train_data(shards, config), {*evaluated_images(shards, config, "val").ids}
        assert evaluated == {*evaluated_images(shards, config, HELD_OUT).ids} == ids_of(data, "held_out")
        assert ids_of(data, "labeled") == labeled - evaluated
        hidden = {key for batch in hidden_batches(data, 100) for key in batch.ids}
        stream = {each.id for each in read_unlabeled(data, config, unlabeled_positions(config, 0, 1, 0))}
        assert hidden == stream == ids_of(train_data(shards, tiny), "unlabeled")
        assert {*evaluated_images(shards, config, "test").ids} == {*shards.index("test").ids}
        supervised = train_data(shards, changed(config, method="supervised", seed=3))
        assert ids_of(supervised, "held_out") == evaluated, "arms are paired"
        found += evaluated
    assert sorted(found) == sorted(labeled)


def test_a_fold_that_is_put_aside_is_seen_nowhere(tiny: TrainConfig) -> None:
    shards = open_shards(tiny.data.shards)
    folds = [{"count": 3, "held_out": number} for number in range(3)]
    first, second, third = (ids_of(train_data(shards, changed(tiny, data__folds=each)), "held_out") for each in folds)
    data = train_data(shards, changed(tiny, data__folds={**folds[1], "aside": 0}))
    assert (ids_of(data, "labeled"), ids_of(data, "held_out")) == (third, second)
    hidden = {key for batch in hidden_batches(data, 100) for key in batch.ids}
    assert hidden == ids_of(data, "unlabeled") == ids_of(train_data(shards, tiny), "unlabeled")
    assert not first & hidden


def test_fewer_unlabelled_images_are_used(tiny: TrainConfig) -> None:
    config = changed(tiny, data__unlabeled=5)
    data = train_data(open_shards(tiny.data.shards), config)
    assert len(ids_of(data, "unlabeled")) == 5
    assert {each.id for each in read_unlabeled(data, config, unlabeled_positions(config, 0, 1, 0))} == ids_of(
        data, "unlabeled"
    )


@pytest.fixture
def without_val(tmp_path: Path) -> Shards:
    """Nine training images, six of them with masks; val has none, and test does not exist."""
    sources = [pair(tmp_path, f"{n:02d}", size=(30 + 2 * n, 40)) for n in range(6)]
    bare, val = ([pair(tmp_path, f"{name}{n}", masked=False) for n in range(3)] for name in "uv")
    write_shards(tmp_path / "shards", plan({"train": [*sources, *bare], "val": val}))
    return open_shards(tmp_path / "shards")


def test_folds_need_no_val_and_no_test(tiny: TrainConfig, without_val: Shards) -> None:
    config = changed(tiny, data__shards=str(without_val.folder))
    with pytest.raises(DataError, match="split 'val' must have masks to be evaluated on, but has none"):
        check_data(without_val, config)
    with pytest.raises(DataError, match=r"split 'val' must have masks for data\.further_labeled, but has none"):
        train_data(without_val, changed(config, data__further_labeled=["val"]))
    for held_out in (0, None):
        folded = changed(config, method="supervised", data__folds={"count": 3, "held_out": held_out})
        check_data(without_val, folded)
        evaluated = evaluated_images(without_val, folded, "val")
        assert len(evaluated) == (2 if held_out == 0 else 6)
        assert {*evaluated_sizes(without_val, folded)} == {*zip(evaluated.height, evaluated.width, strict=True)}
    with pytest.raises(DataError, match="no split 'held_out'"):
        evaluated_images(without_val, folded, HELD_OUT)


def test_masks_without_a_pixel_that_counts_cannot_be_evaluated_on(
    tiny: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards, config = open_shards(tiny.data.shards), changed(tiny, data__slices={"first": "val_00000"})
    index = shards.index("val")
    assert "val/first/miou" in metrics_of(shards, config, "val")
    pixels = index.pixels.copy()
    pixels[[key == "val_00000" for key in index.ids]] = 0
    monkeypatch.setattr(Shards, "index", lambda *_: replace(index, pixels=pixels))
    known = metrics_of(shards, config, "val")
    assert "val/miou" in known
    assert "val/first/miou" not in known
    pixels[:] = 0
    with pytest.raises(
        DataError, match=r"the masks of 'val' must have pixels that count, but every pixel of its 6 is ignored"
    ):
        evaluated_images(shards, config, "val")


def test_masks_of_val_are_evaluated_where_no_fold_is_held_out(tiny: TrainConfig) -> None:
    shards, config = open_shards(tiny.data.shards), changed(tiny, data__folds={"count": 3})
    assert evaluated_images(shards, config, "val").ids == shards.index("val").ids
