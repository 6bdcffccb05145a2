"""`bench driver` on a few trials."""

import json
from pathlib import Path

import pytest

from cps_ray.bench import driver
from cps_ray.bench.__main__ import main


@pytest.mark.parametrize("early_stopping", ["asha", "none"])
def test_the_driver_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], early_stopping: str
) -> None:
    monkeypatch.setattr(driver, "_in_new_process", driver._run_sweep)  # it would import torch and Ray once more
    file = tmp_path / "driver.json"
    assert main(["driver", "--trials", "5", "--early-stopping", early_stopping, "--json", str(file)]) == 0
    assert "CPU ms per trial" in capsys.readouterr().out
    (row,) = json.loads(file.read_text())
    assert sum(row["states"].values()) == row["trials"] == 5
    assert (row["states"]["complete"] == 5) == (early_stopping == "none")
    assert 0 < row["ask_cpu_s"] < row["cpu_s"] < 5
    assert row["files_per_trial"] == 2
