"""`bench folds` without trainings: what it reuses, and its table."""

import argparse
from pathlib import Path
from typing import Any

import pytest

from cps_ray.bench import folds
from cps_ray.errors import ConfigError, CpsRayError


def asked(folder: Path, **others: Any) -> argparse.Namespace:
    given = {"folder": folder, "folds": 5, "labeled": 16, "held": 7, "images": 2000, "set": [], "jobs": 1, **others}
    return argparse.Namespace(**given)


def test_a_sweep_that_is_there_is_not_repeated_but_one_with_other_settings_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    codes, root = [1, 0], tmp_path / "set-1"
    ended = lambda command: argparse.Namespace(returncode=codes.pop(0))  # noqa: E731
    monkeypatch.setattr("cps_ray.bench.folds.subprocess.run", ended)
    with pytest.raises(CpsRayError, match="set-1: its sweep has failed"):
        folds._sweep(root, asked(tmp_path), 1)
    minutes = folds._sweep(root, asked(tmp_path), 1)
    assert folds._sweep(root, asked(tmp_path), 1) == minutes
    for others in ({"labeled": 8}, {"set": ["train.schedule.steps=200"]}):
        with pytest.raises(ConfigError, match=r"but set-1\.json has others"):
            folds._sweep(root, asked(tmp_path, **others), 1)
    assert codes == []


@pytest.mark.parametrize(
    ("low", "high", "word"), [(0.01, 0.05, "better"), (-0.05, -0.01, "worse"), (-0.01, 0.01, "not distinguishable")]
)
def test_what_was_said_stands_beside_what_is_true(low: float, high: float, word: str) -> None:
    mious = {"folds_miou": 0.5, "true_folds_miou": 0.49, "true_delivered_miou": 0.51}
    row = {"set": 1, "minutes": 2.0, "gain": (low + high) / 2, "low": low, "high": high, "true_gain": 0.03, **mious}
    (said, interval, inside) = (next(iter(folds.table([row], "").columns[n].cells)) for n in (1, 2, 4))
    assert said.startswith(f"{word}, ")
    assert interval == f"{100 * low:+.1f} to {100 * high:+.1f}"
    assert inside == ("yes" if low <= 0.03 <= high else "no")
