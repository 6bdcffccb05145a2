"""The step on a GPU: near the CPU's, also in half precision. Skipped where there is none, as in CI."""

import pytest
import torch
from support import changed

from cps_ray.config.train import TrainConfig
from cps_ray.engine.batch import Batch
from cps_ray.engine.ranks import Ranks
from cps_ray.engine.state import build_state
from cps_ray.engine.step import train_step

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize(("autocast", "tolerance"), [("none", 1e-3), ("bf16", 5e-2), ("fp16", 5e-2)])
def test_losses_are_the_cpus(tiny: TrainConfig, autocast: str, tolerance: float) -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (8, 3, 32, 48), generator=generator, dtype=torch.uint8)
    batch = Batch(images[:4], torch.randint(0, 7, (4, 32, 48), generator=generator).to(torch.uint8), images[4:])
    gpus = {"resources.gpus_per_worker": 1.0, "compute.autocast": autocast, "compute.channels_last": True}
    config = changed(tiny, **{name.replace(".", "__"): value for name, value in gpus.items()})
    ours = build_state(config, 7, Ranks(device=torch.device("cuda", 0)))
    cpu = build_state(tiny, 7, Ranks())
    for _ in range(3):
        found, expected = train_step(config, ours, batch), train_step(tiny, cpu, batch)
        assert float(found["loss"]) == pytest.approx(float(expected["loss"]), rel=tolerance)
