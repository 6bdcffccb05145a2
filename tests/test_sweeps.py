"""Every shipped sweep loads, and its draws are valid trainings."""

from pathlib import Path

import pytest

from cps_ray import sweep
from cps_ray.config.reader import load_sweep

SWEEPS = sorted((Path(__file__).parents[1] / "sweeps").glob("*.yaml"))


@pytest.mark.parametrize("path", SWEEPS, ids=lambda p: p.stem)
def test_dry_run(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sweep.main([str(path), "--dry-run", "20"]) == 0
    out = capsys.readouterr().out
    assert "Every draw is a valid" in out


def test_cityscapes_says_how_to_get_the_data(capsys: pytest.CaptureFixture[str]) -> None:
    (path,) = [p for p in SWEEPS if p.stem == "cityscapes"]
    assert "model.encoder" in load_sweep(path).search_space
    if load_sweep(path).train.data.shards.exists():
        pytest.skip("the Cityscapes shards are there")
    sweep.main([str(path), "--dry-run"])
    assert "python -m cps_ray.prepare cityscapes" in capsys.readouterr().out
