"""The step on a GPU: near the CPU's, also in half precision, and never waiting. Skipped where there is none, as in CI."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from support import changed

from cps_ray.config.train import TrainConfig
from cps_ray.engine.batch import Batch
from cps_ray.engine.dense import cross_entropy, hard_labels
from cps_ray.engine.ranks import Ranks
from cps_ray.engine.state import build_state
from cps_ray.engine.step import OBSERVE_EVERY, train_step

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
GPU = torch.device("cuda", 0)


@pytest.fixture
def batch() -> Batch:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (12, 3, 32, 48), generator=generator, dtype=torch.uint8)
    mask = torch.randint(0, 7, (4, 32, 48), generator=generator).to(torch.uint8)
    return Batch(images[:4], mask, images[4:8], images[8:])


def on_gpu(config: TrainConfig, **changes: Any) -> TrainConfig:
    return changed(config, resources__gpus_per_worker=1.0, compute__channels_last=True, **changes)


@pytest.mark.parametrize("method", ["cps", "mean_teacher", "fixmatch", "unimatch", "supervised"])
@pytest.mark.parametrize(("autocast", "tolerance"), [("none", 1e-3), ("bf16", 5e-2), ("fp16", 5e-2)])
def test_losses_are_the_cpus(tiny: TrainConfig, batch: Batch, method: str, autocast: str, tolerance: float) -> None:
    # Without dropped features: a GPU draws others.
    changes = {"fixmatch__confidence": 0.0, "unimatch__confidence": 0.0, "unimatch__feature_dropout": 0.0}
    plain = changed(tiny, method=method, ema__decay=0.9, **changes)
    config = on_gpu(plain, compute__autocast=autocast)
    ours = build_state(config, 7, Ranks(device=GPU))
    cpu = build_state(plain, 7, Ranks())
    for _ in range(3):
        found, expected = train_step(config, ours, batch), train_step(plain, cpu, batch)
        assert float(found["loss"]) == pytest.approx(float(expected["loss"]), rel=tolerance)


@contextmanager
def never_waiting() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("supervised", ["ce", "ohem"])
@pytest.mark.parametrize("method", ["cps", "mean_teacher", "fixmatch", "unimatch", "unimatch v2", "supervised"])
def test_a_step_never_waits_for_the_gpu(tiny: TrainConfig, batch: Batch, method: str, supervised: str) -> None:
    method, _, version = method.partition(" ")
    config = on_gpu(tiny, method=method, ema__decay=0.9, loss__supervised=supervised, loss__ohem_min_kept=100)
    config = changed(config, unimatch__version=version or "v1")
    state = build_state(config, 7, Ranks(device=GPU))
    pinned = batch.map(lambda tensor: tensor.pin_memory())
    train_step(config, state, pinned)
    with never_waiting():
        for _ in range(OBSERVE_EVERY):
            train_step(config, state, pinned)


def test_dense_losses_and_labels_are_the_cpus() -> None:
    coarse = torch.randn(3, 5, 8, 16, generator=torch.Generator().manual_seed(0))
    target = torch.randint(0, 5, (3, 30, 33), generator=torch.Generator().manual_seed(1)).to(torch.uint8)
    grads = []
    for device in (torch.device("cpu"), GPU):
        logits = coarse.to(device).requires_grad_()
        loss, _ = cross_entropy(logits, [target.to(device)], [1.0])
        loss.backward()
        grads.append(logits.grad.cpu())
        labels = hard_labels(logits, (30, 33)).cpu()
        assert torch.equal(labels, hard_labels(coarse, (30, 33)))
    assert torch.allclose(*grads, rtol=1e-4, atol=1e-5)
