"""`bench placement` on a small network."""

import json
from pathlib import Path

import pytest

from cps_ray.bench.__main__ import main


@pytest.mark.slow
def test_one_network_per_worker_halves_the_weights_of_a_worker(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["placement", "--encoder", "tu-test_efficientnet", "--crop", "64", "--batch", "2", "--steps", "2"]
    assert main([*words, "--json", str(tmp_path / "placement.json")]) == 0
    assert "relative difference of the loss" in capsys.readouterr().out
    found = json.loads((tmp_path / "placement.json").read_text())
    assert found["loss_differences"][0] < 1e-5
    for replicated, single in zip(found["replicated"], found["one_network_per_worker"], strict=True):
        assert single["weight_bytes"] * 2 == replicated["weight_bytes"]
        assert single["wire_bytes_per_step"] < replicated["wire_bytes_per_step"]
