"""`bench methods`: its variants, and runs on record."""

import json
from pathlib import Path

import pytest

from cps_ray.bench.__main__ import main
from cps_ray.bench.methods import VARIANTS, train_and_evaluate, variants
from cps_ray.config.train import TrainConfig
from cps_ray.config.yaml_reader import dump_yaml
from cps_ray.errors import ConfigError


def test_every_variant_is_a_training_and_changes_something(tiny: TrainConfig) -> None:
    found = variants(tiny, None)
    assert [*found] == [*VARIANTS]
    assert len({config.model_dump_json() for config in found.values()}) == len(VARIANTS)
    assert [*variants(tiny, ["networks: 3"])] == ["  networks: 3"]
    with pytest.raises(ConfigError, match="--only 'cutmix': must be one of supervised, "):
        variants(tiny, ["cutmix"])


def test_a_variant_is_trained_and_evaluated_on_the_split(tiny: TrainConfig) -> None:
    figures = train_and_evaluate(variants(tiny, ["cps + cutmix"])["cps + cutmix"].dump(), "test", threads=1)
    assert figures["step"] == 6
    assert figures["seconds"] > 0.0
    assert {"test/miou", "test/b/miou", "test/ensemble/miou", "pseudo/miou", "pseudo/agreement"} <= {*figures}
    assert not [name for name in figures if name.startswith("val/")]


def test_runs_on_record_are_kept_and_those_of_another_training_refused(
    tiny: TrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "t.yaml").write_text(dump_yaml(tiny.dump(str(tmp_path))))
    words = ["methods", str(tmp_path / "t.yaml"), "--only", "supervised", "--json", str(tmp_path / "methods.json")]
    assert main([*words, "--seeds", "1"]) == 0
    record = json.loads((tmp_path / "methods.json").read_text())
    record["runs"]["supervised seed 2"] = {"test/miou": 0.25, "seconds": 1.0}
    (tmp_path / "methods.json").write_text(json.dumps(record))
    capsys.readouterr()
    assert main([*words, "--seeds", "1", "2"]) == 0
    assert "seed" not in capsys.readouterr().out.split("evaluated on test")[0], "nothing was left to train"
    for change, message in [
        (["--set", "optim.lr=0.5"], "`optim` was {'name': 'sgd', 'lr': 0.01"),
        (["--split", "val"], "evaluated on test, not on val"),
    ]:
        assert main([*words, *change]) == 2
        assert message in " ".join(capsys.readouterr().err.split())
    (tmp_path / "methods.json").write_text("[]")
    assert main(words) == 2
    assert "must be a record of `bench methods`" in " ".join(capsys.readouterr().err.split())
