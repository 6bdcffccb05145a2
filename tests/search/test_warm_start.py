"""A search that learns from earlier ones: what is taken, what is refused, and that none of it is the sweep's own. No cluster."""

import sqlite3
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState
from support import changed

from cps_ray.config.sweep import SweepConfig
from cps_ray.config.train import TrainConfig
from cps_ray.errors import ConfigError
from cps_ray.search.study import SweepStudy
from cps_ray.search.sweep_folder import write_resolved

Space = dict[str, dict[str, Any]]
WEIGHT = {"type": "float", "low": 0.1, "high": 10.0, "log": True}
SPACE: Space = {
    "cps.weight": WEIGHT,
    "augment.scale": {"type": "choice", "values": [[0.5, 2], [0.75, 1.5]]},
    "cps.cutmix_boxes": {"type": "int", "low": 1, "high": 5, "when": {"augment.scale": [[0.5, 2]]}},
}


def sweep(tiny: TrainConfig, tmp_path: Path, name: str, space: Space = SPACE, **more: Any) -> SweepConfig:
    train = changed(tiny, schedule__steps=8, schedule__eval_every=2)
    raw = {"version": 1, "name": name, "output": str(tmp_path), "train": train.dump(), "budget": {"trials": 12}}
    raw |= {"sampler": {"startup_trials": 4}, "early_stopping": {"type": "asha", "grace": 4, "reduction": 2}}
    return SweepConfig.model_validate({**raw, "search_space": space, **more})


def open_study(config: SweepConfig) -> SweepStudy:
    folder = config.output / config.name
    folder.mkdir(exist_ok=True)
    write_resolved(folder, config)
    return SweepStudy(config, folder)


def search(study: SweepStudy, count: int) -> None:
    for _ in range(count):
        found = study.ask()
        assert found is not None
        number, train = found
        for step in (2, 4, 6, 8):
            study.report(number, step, 0.5 / (1.0 + abs(train.cps.weight - 3.0)))
            if study.should_prune(number):
                break
        study.tell(number, failure=None)


@pytest.fixture
def earlier(tiny: TrainConfig, tmp_path: Path) -> SweepStudy:
    """Ten trials that have ended well or early, one that failed, one that collapsed, and one that has not ended."""
    study = open_study(sweep(tiny, tmp_path, "earlier", budget={"trials": 13}))
    search(study, 10)
    for collapsed in (False, True):
        found = study.ask()
        assert found is not None
        study.tell(found[0], failure="x", collapsed=collapsed)
    study.ask()
    assert study.counts()["pruned"] > 1
    return study


def test_the_sampler_alone_learns_from_earlier_trials(earlier: SweepStudy, tiny: TrainConfig, tmp_path: Path) -> None:
    config = sweep(tiny, tmp_path, "s", warm_start=[str(tmp_path / "earlier")])
    study = open_study(config)
    assert study.notices[0].endswith("earlier: 11 trials taken; left out: 1 failed, 1 not ended.")
    assert sum(study.counts().values()) == 0
    assert (study.trials, study.best(), study.failures()) == ([], None, (0, 0))
    warm = study.study.trials[:11]
    own = [trial for trial in earlier.study.trials if trial.state in (TrialState.COMPLETE, TrialState.PRUNED)]
    for one, other in zip(warm, own, strict=True):
        assert (one.state, one.value, one.params) == (other.state, other.value, other.params)
        assert one.intermediate_values == other.intermediate_values
    found = study.ask()
    assert found is not None
    assert found[0] == 0
    assert found[1] == config.train, "trial 0 is the file's own"
    study.report(0, 4, 0.001)
    assert not study.should_prune(0), "early stopping knows nothing of the earlier ones"
    study.report(0, 8, 0.001)
    study.tell(0, failure=None)
    search(study, 3)
    (tmp_path / "earlier" / "study.db").unlink()  # it was copied
    again = open_study(config)
    assert [trial.number for trial in again.trials] == [0, 1, 2, 3]
    assert [trial.params for trial in again.trials] == [trial.params for trial in study.trials]
    assert again.counts() == study.counts()
    assert again.best() == study.best()
    search(again, 2)
    assert [trial.number for trial in again.trials] == [0, 1, 2, 3, 4, 5]
    assert [trial.number for trial in again.study.trials if trial.user_attrs.get("score_last")] == list(range(11, 17))


def test_the_model_takes_over_right_after_the_first_trial(
    earlier: SweepStudy, tiny: TrainConfig, tmp_path: Path
) -> None:
    drawn = {}
    for name, warm in (("cold", []), ("warm", [str(tmp_path / "earlier")])):
        study = open_study(sweep(tiny, tmp_path, name, warm_start=warm))
        search(study, 4)
        drawn[name] = [trial.params for trial in study.trials]
    assert drawn["cold"][0] == drawn["warm"][0]
    assert all(cold != warm for cold, warm in zip(drawn["cold"][1:], drawn["warm"][1:], strict=True))


def test_what_is_not_of_this_space_is_left_out_and_other_settings_are_named(
    earlier: SweepStudy, tiny: TrainConfig, tmp_path: Path
) -> None:
    weights = sorted(trial.params["cps.weight"] for trial in earlier.study.trials if trial.state.is_finished())
    cut = (weights[3] * weights[4]) ** 0.5
    narrow = {**SPACE, "cps.weight": {**WEIGHT, "low": cut}}
    warm = {"warm_start": [str(tmp_path / "earlier")]}
    config = sweep(changed(tiny, optim__lr=0.5, seed=3), tmp_path, "narrow", narrow, **warm)
    first, second, *_ = open_study(config).notices
    taken = int(first.split("earlier: ")[1].split()[0])
    assert taken == 11 - sum(
        trial.params["cps.weight"] < cut
        for trial in earlier.study.trials
        if trial.state in (TrialState.COMPLETE, TrialState.PRUNED)
    )
    assert "of other parameters or values" in first
    assert second.startswith("warning: ")
    assert second.endswith("its train differs from this one's in seed, optim.lr.")
    more = {**SPACE, "optim.lr": {"type": "float", "low": 0.01, "high": 0.02}}
    fewer = {"cps.weight": WEIGHT}
    other = {**SPACE, "augment.scale": {"type": "choice", "values": [[0.5, 1], [0.7, 1.5]]}}
    for number, space in enumerate((more, fewer, other)):
        assert ": 0 trials taken" in open_study(sweep(tiny, tmp_path, str(number), space, **warm)).notices[0]


def test_what_does_not_compare_is_refused_by_name(earlier: SweepStudy, tiny: TrainConfig, tmp_path: Path) -> None:
    def refusal(name: str, **more: Any) -> str:
        with pytest.raises(ConfigError) as caught:
            open_study(sweep(tiny, tmp_path, name, warm_start=[str(tmp_path / "earlier")], **more))
        assert "\n" not in str(caught.value)
        return str(caught.value)

    text = refusal("metric", objective={"metric": "val/accuracy"})
    assert "must have the objective val/accuracy (best), but has val/miou (best): its values do not compare" in text
    assert "val/miou (best)" in refusal("select", objective={"select": "last"})
    path = tmp_path / "earlier" / "study.db"
    whole = path.read_bytes()
    path.write_bytes(whole[:3000])
    assert "study.db must be the study of sweep earlier, but cannot be read as one" in refusal("damaged")
    path.write_bytes(b"")
    assert "cannot be read as one" in refusal("empty")
    assert path.read_bytes() == b"", "it is only read"
    path.write_bytes(whole)
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE study_directions SET direction = 'MINIMIZE'")
    connection.close()
    assert "its study must maximise, but minimises" in refusal("direction")
    (tmp_path / "earlier" / "sweep.yaml").unlink()
    assert "must be the folder of a sweep (with sweep.yaml and study.db), but is not." in refusal("none")
    assert optuna.logging.get_verbosity() == optuna.logging.WARNING
