"""Which images are suggested: scores against a computation in numpy, and a choice that is spread out, without copies, the same each time."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from support import changed, write_untrained

from cps_ray.config.train import TrainConfig
from cps_ray.datasets.images import decode_image
from cps_ray.datasets.shards import Index, open_shards
from cps_ray.model import suggesting
from cps_ray.model.model import Model, load_model
from cps_ray.model.suggesting import ImageScores, class_weights, score_images, suggest, validation_ious


@pytest.fixture(scope="module")
def model(taught: Path) -> Model:
    return load_model(taught, device="cpu")


@pytest.fixture(scope="module")
def unread(pair: TrainConfig) -> Index:
    """The training split; whoever reads a mask of it gets an error."""
    index = open_shards(pair.data.shards).index("train")
    return replace(index, locations=replace(index.locations, mask_sha256=np.zeros_like(index.locations.mask_sha256)))


def test_weights_of_classes() -> None:
    weights = class_weights(np.array([0, 10, 240, 750]), [0.5, None, 0.0, 1.0])
    assert weights.tolist() == pytest.approx([4 * 1.5, 4 * 1.5, 1 / (4 * 0.24) * 2, 1 / (4 * 0.75) * 1])
    assert class_weights(np.zeros(3, np.int64), [None] * 3).tolist() == [6.0] * 3
    assert class_weights(np.array([999_999, 1, 0, 0, 0, 0, 0, 0]), [0.0] * 8)[0] == 0.25 * 2


def test_ious_are_those_of_the_validation_split() -> None:
    metrics = {"val/iou/road": 0.5, "test/iou/road": 0.9, "test/iou/car": 0.9, "val/iou/sky": None}
    assert validation_ious(metrics, ["road", "car", "sky"]) == [0.5, None, None]
    assert validation_ious(None, ["road"]) == [None]


def entropies(prob: NDArray[Any]) -> NDArray[Any]:
    return np.asarray(-(prob * np.log(np.maximum(prob, 1e-30))).sum(-1) / np.log(prob.shape[-1]))


def test_scores_of_two_networks(taught: Path, model: Model, unread: Index) -> None:
    rows, weights = np.array([3, 20, 7, 11]), np.linspace(0.5, 3, 7)
    done: list[int] = []
    scores = score_images(model, unread, rows, weights, done.append)
    assert sum(done) == 4
    assert scores.disagreement is not None
    a, b = (load_model(taught, device="cpu", network=name) for name in "ab")
    for number, encoded in enumerate(unread.locations.read(rows.tolist(), masks=False)):
        image = decode_image(encoded.image)
        each = [network.probabilities(image).astype(float) for network in (a, b)]
        together = np.mean(each, axis=0)
        differ, label = each[0].argmax(-1) != each[1].argmax(-1), together.argmax(-1)
        assert differ.any()
        assert scores.disagreement[number] == pytest.approx(differ.mean(), abs=1e-3)
        assert scores.score[number] == pytest.approx((weights[label] * differ).mean(), abs=2e-3)
        assert scores.entropy[number] == pytest.approx(entropies(together).mean(), abs=1e-5)
        assert scores.fraction[number] == pytest.approx(np.bincount(label.ravel(), minlength=7) / label.size, abs=1e-3)


def test_scores_of_one_network_are_entropies(tiny: TrainConfig, unread: Index, tmp_path: Path) -> None:
    config = changed(tiny, method="supervised")
    write_untrained(config, tmp_path)
    model = load_model(tmp_path, device="cpu")
    weights = np.linspace(0.5, 3, 7)
    scores = score_images(model, unread, np.array([5]), weights)
    assert scores.disagreement is None
    (encoded,) = unread.locations.read([5], masks=False)
    prob = model.probabilities(decode_image(encoded.image)).astype(float)
    assert scores.score[0] == pytest.approx((weights[prob.argmax(-1)] * entropies(prob)).mean(), rel=1e-4)


def test_features_are_the_encoders(model: Model, unread: Index) -> None:
    found = suggesting._features(model, unread, np.array([4, 2, 4, *range(8, 20)]), lambda images: None)
    assert found.shape[0] == 15
    assert np.linalg.norm(found, axis=1) == pytest.approx(1)
    assert np.array_equal(found[0], found[2])
    segmenter = model.networks("a")["a"]
    (encoded,) = unread.locations.read([2], masks=False)
    image = model.to_tensor(decode_image(encoded.image)).float()  # 32x48, as large as a crop
    padded = torch.nn.functional.pad((image - segmenter.mean) / segmenter.std, (0, 16))  # to 32x64
    expected = segmenter.network.encoder(padded)[-1].mean((0, 2, 3)).double().numpy()  # type: ignore[operator, union-attr]
    assert found[1] == pytest.approx(expected / np.linalg.norm(expected), abs=1e-5)
    assert not segmenter.network.encoder._forward_hooks  # type: ignore[union-attr]


def scored(rows: NDArray[np.int64], score: list[float]) -> ImageScores:
    values = np.array(score)
    return ImageScores(rows, values, None, np.zeros(len(values)), np.zeros((len(values), 7)))


@pytest.fixture
def on_a_circle(monkeypatch: pytest.MonkeyPatch, unread: Index) -> Index:
    """Image n lies at n times 10 degrees; no image looks like another."""

    def features(model: Model, index: Index, rows: NDArray[np.int64], on_images: Any) -> NDArray[np.float64]:
        angles = np.radians(10.0 * rows)
        return np.stack([np.cos(angles), np.sin(angles)], axis=1)

    monkeypatch.setattr(suggesting, "_features", features)
    hashes = np.random.default_rng(0).integers(0, 2**63, len(unread), np.uint64)
    return replace(unread, perceptual_hash=hashes)


def test_chosen_images_are_far_from_labelled_ones_and_each_other(model: Model, on_a_circle: Index) -> None:
    rows = np.arange(1, 19)  # to 180 degrees
    scores = scored(rows, [1.0] * 18)
    chosen = suggest(model, on_a_circle, scores, np.array([0]), 2)
    assert len(chosen) == 2
    pool = [*range(4)]  # of equal scores the first ones, twice as many as are wanted: 10 to 40 degrees
    assert rows[chosen].tolist() == [4, 2]
    assert set(chosen) <= set(pool)


def test_the_best_begins_where_nothing_is_labelled(model: Model, on_a_circle: Index) -> None:
    scores = scored(np.arange(18), [0.1 * (n % 7) for n in range(18)])
    chosen = suggest(model, on_a_circle, scores, np.array([], np.int64), 1)
    assert chosen.tolist() == [6]
    # Of the four best, at 60, 130, 50 and 120 degrees.
    assert suggest(model, on_a_circle, scores, np.array([], np.int64), 2).tolist() == [6, 13]


def test_images_that_look_alike_are_never_both_chosen(model: Model, on_a_circle: Index) -> None:
    hashes = on_a_circle.perceptual_hash.copy()
    hashes[5] = hashes[6] ^ np.uint64(0b111)
    hashes[9] = hashes[0] ^ np.uint64(0b1)
    index = replace(on_a_circle, perceptual_hash=hashes)
    rows = np.arange(1, 19)
    chosen = rows[suggest(model, index, scored(rows, [1.0] * 18), np.array([0]), 18)]
    assert len(set(chosen.tolist())) == 16
    assert len({5, 6} & set(chosen.tolist())) == 1
    assert 9 not in chosen


def test_the_same_each_time(model: Model, unread: Index) -> None:
    rows, labeled = np.arange(6, 24), np.arange(6)
    weights = class_weights(unread.pixels[labeled].sum(0), [None] * 7)
    scores = score_images(model, unread, rows, weights)
    first = suggest(model, unread, scores, labeled, 5)
    assert first.tolist() == suggest(model, unread, scores, labeled, 5).tolist()
    # The order of candidates decides nothing.
    turned = suggest(model, unread, score_images(model, unread, rows[::-1], weights), labeled, 5)
    assert rows[::-1][turned].tolist() == rows[first].tolist()
