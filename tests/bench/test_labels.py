"""`bench methods`: the oracle and the shuffled control against losses written out."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from support import changed
from torch import nn

from cps_ray.bench.labels import ShuffledLabels, TrueMasks, with_true_masks
from cps_ray.config.train import TrainConfig
from cps_ray.datasets.images import decode_image, decode_mask
from cps_ray.datasets.loader import TrainData, train_batches, train_data
from cps_ray.datasets.shards import open_shards
from cps_ray.engine.batch import IGNORE, Batch
from cps_ray.engine.state import build_state
from cps_ray.engine.step import train_step

CLASSES = 7


@pytest.fixture
def plain(tiny: TrainConfig) -> TrainConfig:
    """CPS on whole unmixed images: their masks can be looked up."""
    return changed(
        tiny, cps__mix="none", cps__ramp=0.0, augment__scale=[1.0, 1.0], augment__flip=0.0, compute__cpu_kernels=False
    )


def data_of(config: TrainConfig) -> TrainData:
    return train_data(open_shards(config.data.shards), config)


@pytest.fixture
def batches(plain: TrainConfig) -> Iterator[Batch]:
    return train_batches(data_of(plain), plain)


def test_the_oracle_has_the_masks_of_the_images(plain: TrainConfig, batches: Iterator[Batch]) -> None:
    data, ranks = data_of(plain), TrueMasks()
    mask_of = {decode_image(one.image).tobytes(): one.mask for one in data.unlabeled.read(range(len(data.unlabeled)))}
    steps = 0
    for batch in with_true_masks(batches, ranks, data, plain):
        assert batch.unlabeled_image is not None
        masks, other = ranks.exchange([batch.labeled_mask, batch.labeled_mask])
        assert torch.equal(masks, other)
        for image, mask in zip(batch.unlabeled_image, masks, strict=True):
            expected = mask_of[np.ascontiguousarray(image.permute(1, 2, 0).numpy()).tobytes()]
            assert expected is not None
            assert np.array_equal(mask.numpy(), decode_mask(expected))
        steps += 1
    assert steps == plain.schedule.steps


def test_masks_follow_zoom_crop_and_flip(tiny: TrainConfig) -> None:
    config = changed(tiny, data__crop_px=[32, 32], augment__color=0.5)
    ranks, data = TrueMasks(), data_of(config)
    for _ in with_true_masks(train_batches(data, config), ranks, data, config):  # which compares the images
        pass
    with pytest.raises(AssertionError, match="another crop"):
        next(with_true_masks(train_batches(data, changed(config, seed=1)), TrueMasks(), data, config))


def test_masks_are_asked_for_all_at_once_or_not_at_all(plain: TrainConfig, batches: Iterator[Batch]) -> None:
    ranks = TrueMasks()
    told = with_true_masks(batches, ranks, data_of(plain), plain)
    next(told)  # as before `cps.start`
    batch = next(told)
    assert len(ranks.masks) == 4, "those of the step before are gone"
    ranks.exchange([batch.labeled_mask[:3]])
    with pytest.raises(AssertionError, match="of some images only"):
        next(told)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("told", [TrueMasks, ShuffledLabels])
def test_the_loss_is_that_of_the_other_labels(
    plain: TrainConfig, told: type[TrueMasks] | type[ShuffledLabels], accumulate: int
) -> None:
    config, ranks = changed(plain, compute__accumulate=accumulate), told()
    data, state = data_of(config), build_state(config, CLASSES, ranks)
    batches: Iterator[Batch] = train_batches(data, config)
    if isinstance(ranks, TrueMasks):
        batches = with_true_masks(batches, ranks, data, config)
    batch = next(batches)
    assert batch.unlabeled_image is not None
    masks = torch.stack(list(ranks.masks)) if isinstance(ranks, TrueMasks) else None
    # Norms stay in evaluation mode, so that what a network predicts does not depend on the micro-batch.
    for network in state.networks.values():
        for norm in (m for m in network.modules() if isinstance(m, nn.BatchNorm2d)):
            norm.train = lambda mode=True, norm=norm: norm  # type: ignore[method-assign]
            norm.training = False
    with torch.no_grad():
        for network in state.networks.values():
            # Untrained networks see one class everywhere: with equal means of the classes, pixels and images differ.
            head = network.network.get_submodule("segmentation_head.0")
            head.bias -= network.logits(batch.unlabeled_image).mean(dim=(0, 2, 3))
        logits = [network.logits(batch.unlabeled_image) for network in state.networks.values()]
    expected = torch.zeros(())
    for own, other in ((0, 1), (1, 0)):
        labels = logits[other].argmax(1)
        half = len(labels) // accumulate
        shuffled = torch.cat([labels[first : first + half].roll(1, 0) for first in range(0, len(labels), half)])
        assert not torch.equal(shuffled, labels)
        target = shuffled if masks is None else masks.long()
        loss = nn.functional.cross_entropy(logits[own], target, ignore_index=IGNORE, reduction="sum")
        expected = expected + loss / target.numel()
    assert train_step(config, state, batch)["cps"] == pytest.approx(float(expected), rel=1e-4)
