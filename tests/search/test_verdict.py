"""The end of a sweep in words."""

from pathlib import Path

import pytest

from cps_ray.config.train import NetworkConfig
from cps_ray.engine.encoders import weights_of
from cps_ray.search.verdict import verdict_lines

CONFIGS = {
    "none, trained from scratch": {"encoder": "resnet18"},
    "mine.pt, licence unknown: ask where they come from": {"encoder": "resnet18", "weights_file": "/x/mine.pt"},
    "ssl, licence cc-by-nc-4.0 (see https://huggingface.co/": {"encoder": "resnet18", "weights": "ssl"},
}


@pytest.mark.parametrize("said", CONFIGS)
def test_the_licence_of_the_weights_is_among_the_last_lines(tmp_path: Path, said: str) -> None:
    best = {"trial": 3, "value": 0.5, "step": 20, "params": {"optim.lr": 0.1}}
    weights = weights_of(NetworkConfig.model_validate(CONFIGS[said])).record()
    lines = verdict_lines(tmp_path, {"best": best, "objective": "val/miou", "weights": [weights]})
    assert any(line.startswith(f"Weights of resnet18: {said}") for line in lines[-3:])
