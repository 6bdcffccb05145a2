"""`bench step`: the paper's step and ours, and the command."""

import argparse
import json
from pathlib import Path

import pytest
import torch

from cps_ray.bench.__main__ import main
from cps_ray.bench.step import PAPER, PAPER_TUNED, contestants, make_step

ARGS = argparse.Namespace(
    architecture="deeplabv3plus",
    crop=64,
    batch=2,
    classes=5,
    device="cpu",
    threads=1,
    bf16=False,
    compile=False,
    loss=[],
)
ENCODER = "tu-test_efficientnet"
FAITHFUL = "ours, the paper's switches"


def test_the_papers_step_and_ours_with_its_switches_have_the_same_loss() -> None:
    """They are written independently of each other."""
    torch.set_num_threads(1)
    first = {name: make_step(ARGS, ENCODER, name)() for name in contestants(ARGS)}
    assert first[PAPER_TUNED] == first[PAPER]
    assert first[FAITHFUL] == pytest.approx(first[PAPER], rel=1e-5)
    assert first["ours"] == pytest.approx(first[PAPER], rel=0.1), "it pastes other images"
    assert first["ours"] != pytest.approx(first[PAPER], rel=1e-5)


@pytest.mark.slow
def test_the_command_measures_and_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["step", "--encoders", ENCODER, "--crop", "64", "--batch", "2", "--rounds", "1", "--threads", "1"]
    assert main([*words, "--json", str(tmp_path / "step.json")]) == 0
    assert FAITHFUL in capsys.readouterr().out
    rows = json.loads((tmp_path / "step.json").read_text())["encoders"][ENCODER]
    assert [*rows] == [*contestants(ARGS)]
    assert rows[PAPER]["of_paper"] == rows[PAPER]["memory_of_paper"] == 1.0
    assert rows[FAITHFUL]["flops"] == rows[PAPER]["flops"] > rows["ours"]["flops"] > 0
    assert all(row["peak_bytes"] > 0 and row["step_s"] > 0.0 for row in rows.values())
