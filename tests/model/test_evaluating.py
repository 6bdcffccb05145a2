"""Scores of a model: against a count by hand, the interval of a difference, masks that are refused."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cps_ray.config.train import TrainConfig
from cps_ray.datasets.loader import eval_batches
from cps_ray.datasets.shards import open_shards
from cps_ray.engine.evaluation import evaluate, summarise
from cps_ray.engine.networks import build_networks
from cps_ray.engine.ranks import Ranks
from cps_ray.errors import DataError
from cps_ray.model.evaluating import (
    evaluate_model,
    file_batches,
    pair_files,
    read_labels,
)
from cps_ray.model.examples import confusion_picture
from cps_ray.model.intervals import image_ious
from cps_ray.model.model import load_model


@pytest.mark.parametrize("network", ["a", "b", "ensemble"])
def test_scores_are_those_of_the_training(exported: Path, pair: TrainConfig, network: str) -> None:
    shards = open_shards(pair.data.shards)
    expected = summarise(
        evaluate(pair, build_networks(pair, 7), eval_batches(shards, "test"), 7, Ranks()), shards.classes, "test"
    )
    scores = evaluate_model(load_model(exported, device="cpu", network=network), eval_batches(shards, "test"), 3)
    found = scores.metrics()
    prefix = "test" if network == "a" else f"test/{network}"
    assert found["miou"] == pytest.approx(expected[f"{prefix}/miou"], abs=1e-12)
    assert found["ece"] == pytest.approx(expected[f"{prefix}/ece"], abs=1e-9)
    assert scores.matrix.sum() == sum(each[1].sum() for each in scores.counts)
    if network == "a":
        for name in ("iou_micro", "pixel_accuracy", "class_accuracy"):
            assert found[name] == pytest.approx(expected[f"test/{name}"])
        ious = {name: row["iou"] for name, row in found["classes"].items() if row["iou"] is not None}
        assert ious == pytest.approx({name: expected[f"test/iou/{name}"] for name in ious})
    if network == "ensemble":
        for name in "ab":
            matrix = scores.others[name]
            value = image_ious(np.stack([matrix.diagonal(), matrix.sum(1), matrix.sum(0)]))
            assert value == pytest.approx(expected["test/miou" if name == "a" else "test/b/miou"])


def test_the_worst_images_are_the_worst(exported: Path, pair: TrainConfig) -> None:
    shards = open_shards(pair.data.shards)
    model = load_model(exported, device="cpu")
    scores = evaluate_model(model, eval_batches(shards, "test"), 3)
    by_image = dict(zip(scores.ids, (float(image_ious(each)) for each in scores.counts), strict=True))
    assert [value for value, _ in scores.worst] == sorted(by_image.values())[:3]
    for value, (image_id, image, mask, predicted) in scores.worst:
        assert by_image[image_id] == value
        assert np.array_equal(model.predict(image), predicted)
        assert mask.shape == predicted.shape


def counts(hit: list[int], true: list[int], predicted: list[int]) -> np.ndarray:
    return np.array([hit, true, predicted])


def test_mean_iou_leaves_out_what_is_nowhere() -> None:
    assert image_ious(counts([2, 0, 0], [4, 0, 0], [2, 2, 0])) == pytest.approx((2 / 4 + 0) / 2)
    assert np.isnan(image_ious(counts([0], [0], [0])))


def test_files_are_evaluated_as_shards_are(exported: Path, pair: TrainConfig, tmp_path: Path) -> None:
    shards = open_shards(pair.data.shards)
    images, masks = {}, {}
    for batch in eval_batches(shards, "test", size_px=1):
        name = batch.ids[0]
        images[name], masks[name] = tmp_path / f"{name}.png", tmp_path / f"{name}_mask.png"
        Image.fromarray(batch.image[0].permute(1, 2, 0).numpy()).save(images[name])
        labels = Image.fromarray(batch.mask[0].numpy())
        labels.putpalette([channel for color in shards.manifest.palette for channel in color])
        labels.save(masks[name])
    model = load_model(exported, device="cpu")
    found = evaluate_model(model, file_batches(model, pair_files(images, masks)))
    expected = evaluate_model(model, eval_batches(shards, "test", size_px=1))
    assert np.array_equal(found.matrix, expected.matrix)


@pytest.mark.parametrize(
    ("mask", "text"),
    [
        (np.full((4, 4), 9, np.uint8), "holds also 9"),
        (np.zeros((4, 4, 3), np.uint8), "holds an RGB PNG"),
        (np.full((4, 4), 300, np.uint16), "holds also 300"),
    ],
)
def test_masks_of_other_kinds_are_refused(exported: Path, tmp_path: Path, mask: np.ndarray, text: str) -> None:
    path = tmp_path / "m.png"
    Image.fromarray(mask).save(path)
    with pytest.raises(DataError) as err:
        read_labels(path, load_model(exported, device="cpu"))
    assert f"{path}: a mask must hold positions of the model's 7 classes, 0 to 6, or 255, but" in str(err.value)
    assert text in str(err.value)


def test_a_mask_of_another_size_is_named(exported: Path, tmp_path: Path) -> None:
    Image.new("RGB", (8, 6)).save(tmp_path / "i.png")
    Image.new("L", (8, 7)).save(tmp_path / "m.png")
    model = load_model(exported, device="cpu")
    with pytest.raises(DataError, match=r"m\.png: a mask must be as large as its image, but is 8x7 px for 8x6 px"):
        list(file_batches(model, [("x", tmp_path / "i.png", tmp_path / "m.png")]))


def test_masks_need_images() -> None:
    with pytest.raises(DataError, match="1 have none: b"):
        pair_files({"a": Path()}, {"a": Path(), "b": Path()})
    with pytest.raises(DataError, match="there are no masks"):
        pair_files({"a": Path()}, {})


@pytest.mark.parametrize("classes", [2, 19, 30, 150])
def test_a_matrix_of_any_size_is_drawn(classes: int) -> None:
    matrix = torch.randint(0, 50, (classes, classes), generator=torch.Generator().manual_seed(0)).numpy()
    matrix[1] = 0
    picture = confusion_picture(matrix, [f"class {n}" for n in range(classes)])
    assert picture.width < 2400
    assert picture.getextrema() != ((255, 255),) * 3


def palette_mask(path: Path, palette: list[tuple[int, int, int]], values: np.ndarray) -> Path:
    picture = Image.fromarray(values)
    picture.putpalette([channel for color in palette for channel in color] + [0] * 3 * (256 - len(palette)))
    picture.save(path)
    return path


def test_a_mask_whose_colors_are_of_other_classes_is_refused(exported: Path, tmp_path: Path) -> None:
    """Its numbers are in range, and the scores would be of other classes without a word."""
    model, values = load_model(exported, device="cpu"), np.array([[0, 1], [2, 255]], np.uint8)
    colors = [*model.palette]
    swapped = [colors[1], colors[0], *colors[2:]]
    with pytest.raises(DataError, match="holds sky in the colour of building, building in the colour of sky"):
        read_labels(palette_mask(tmp_path / "swapped.png", swapped, values), model)
    for palette in (colors, [(n, n, n) for n in range(7)]):  # colours of nobody's say nothing
        assert np.array_equal(read_labels(palette_mask(tmp_path / "m.png", palette, values), model), values)


def test_a_mask_that_is_lossy_or_turned(exported: Path, tmp_path: Path) -> None:
    model, values = load_model(exported, device="cpu"), np.array([[0, 1, 2], [3, 4, 5]], np.uint8)
    Image.fromarray(values).save(tmp_path / "m.jpg", quality=100)
    with pytest.raises(DataError, match="but holds a grey JPEG"):
        read_labels(tmp_path / "m.jpg", model)
    exif = Image.Exif()
    exif[0x0112] = 3
    Image.fromarray(values).save(tmp_path / "m.png", exif=exif)
    assert np.array_equal(read_labels(tmp_path / "m.png", model), values[::-1, ::-1])
