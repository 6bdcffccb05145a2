"""A small sweep file that tests change line by line."""

from collections.abc import Callable
from pathlib import Path

import pytest

SWEEP = """\
version: 1
name: tiny
output: ../runs
train:
  data:
    shards: ../data/tiny
    labeled: 0.125
    crop_px: [64, 96]
    labeled_batch: 4
    unlabeled_batch: 4
  model: {encoder: resnet18, options: {decoder_channels: 64}}
  optim:
    lr: 1e-2
  schedule: {steps: 200, eval_every: 50}
budget: {trials: 4}
early_stopping: {type: asha, grace: 50}
search_space:
  optim.lr: {type: float, low: 1e-3, high: 1e-1, log: true}
  cps.weight: {type: float, low: 0.5, high: 5}
  cps.mix: {type: choice, values: [none, cutmix]}
  cps.cutmix_boxes: {type: int, low: 1, high: 5, when: {cps.mix: cutmix}}
enqueue:
  - {optim.lr: 0.01, cps.mix: cutmix, cps.cutmix_boxes: 3}
baselines:
  supervised: {method: supervised}
final:
  seeds: [1, 2]
  set: {schedule.steps: 400}
"""


@pytest.fixture
def sweep_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Writes `sweeps/x.yaml` with (old, new) parts of the text replaced; the working directory is above it."""
    monkeypatch.chdir(tmp_path)
    Path("sweeps").mkdir()

    def write(*changes: tuple[str, str]) -> Path:
        text = SWEEP
        for old, new in changes:
            assert old in text
            text = text.replace(old, new, 1)
        path = Path("sweeps/x.yaml")
        path.write_text(text, encoding="utf-8")
        return path

    return write
