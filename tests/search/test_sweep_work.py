"""Parts of a sweep's work that need no cluster: which of the best trials is taken, and what is said of a finished one."""

from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from cps_ray.config.sweep import SweepConfig
from cps_ray.config.train import TrainConfig
from cps_ray.errors import FinalRunError, NoTrialError
from cps_ray.search.further_searches import open_study
from cps_ray.search.study import SweepStudy
from cps_ray.search.sweep import Sweep


def begun(tiny: TrainConfig, root: Path, values: list[float], **budget: Any) -> Sweep:
    """A sweep whose trials have ended with these values."""
    config = SweepConfig.model_validate(
        {
            "version": 1,
            "name": "s",
            "output": str(root),
            "train": tiny.dump(),
            "budget": {"trials": len(values), **budget},
            "sampler": {"type": "random"},
            "early_stopping": {"type": "none"},
            "search_space": {"optim.lr": {"type": "float", "low": 0.001, "high": 0.1}},
            "final": {"seeds": [1, 2], "top": 2},
        }
    )
    sweep = Sweep(config, root, Console(), None)
    sweep._study = SweepStudy(config, root)
    for value in values:
        found = sweep._study.ask()
        assert found is not None
        sweep._study.report(found[0], tiny.schedule.steps, value)
        sweep._study.tell(found[0], failure=None)
    return sweep


@pytest.mark.parametrize(
    ("collapsed", "elected"),
    [
        ([], 2),
        (["trial-0002-seed1"], 1),
        (["trial-0002-seed1", "trial-0001-seed2"], None),
    ],
)
def test_the_best_by_the_mean_over_seeds_is_taken_of_those_that_did_not_collapse(
    tiny: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, collapsed: list[str], elected: int | None
) -> None:
    sweep = begun(tiny, tmp_path, [0.1, 0.5, 0.4])
    assert sweep._study.best().number == 1
    reached = {"trial-0001-seed1": 0.5, "trial-0001-seed2": 0.1, "trial-0002-seed1": 0.4, "trial-0002-seed2": 0.4}
    monkeypatch.setattr("cps_ray.search.sweep.validation", lambda run: reached[run.job.name])
    monkeypatch.setattr(
        Sweep, "_train", lambda _, runs, may_collapse: {run.job.name: "no" for run in runs if run.job.name in collapsed}
    )
    if elected is None:
        with pytest.raises(FinalRunError, match="each of the 2 best trials collapsed when it was trained again"):
            sweep._run_candidates()
        assert not sweep._study.is_elected
        return
    sweep._run_candidates()
    assert sweep._study.is_elected
    assert sweep._study.best().number == elected


@pytest.mark.parametrize(
    ("budget", "said"),
    [
        ({}, " More trials: --trials N."),
        ({"trials": 9, "patience": 2}, " More trials: --patience N."),
        ({"trials": 3, "patience": 2}, " More trials: --trials N --patience N."),
        ({"trials": 9, "time": "1h"}, " More trials: --time T."),
        ({"trials": 9}, ""),
    ],
)
def test_how_a_finished_search_could_go_on_names_what_has_ended_it(
    tiny: TrainConfig, tmp_path: Path, budget: dict[str, Any], said: str
) -> None:
    sweep = begun(tiny, tmp_path, [0.5, 0.2, 0.3], **budget)
    sweep._study.add_seconds(4000)
    assert sweep._how_to_extend() == said


def test_a_summary_that_knew_fewer_settings_is_still_of_what_is_asked_for(tiny: TrainConfig, tmp_path: Path) -> None:
    sweep = begun(tiny, tmp_path, [0.5])
    asked = sweep._config.final.model_dump(mode="json")
    assert sweep._is_asked_for(asked)
    del asked["nested"], asked["curve"]
    assert sweep._is_asked_for(asked)
    assert not sweep._is_asked_for({**asked, "seeds": [1, 2, 3]})
    assert not sweep._is_asked_for({**asked, "of_a_later_version": 1})


def test_a_further_search_without_a_complete_trial_ends_the_sweep_with_a_way_on(
    tiny: TrainConfig, tmp_path: Path
) -> None:
    sweep = begun(tiny, tmp_path, [0.5, 0.4])
    baselines = {"plain": {"method": "supervised", "search": ["optim.lr"]}}
    sweep._config = SweepConfig.model_validate(sweep._config.model_dump() | {"baselines": baselines})
    (search,) = sweep._further_searches()
    sweep._need_bests_of_further_searches()  # it has not been made yet
    assert not sweep._is_made(search)
    study = open_study(tmp_path, search.sweep, search.folder)
    for _ in range(2):
        number, _ = study.ask()
        study.tell(number, failure="out of memory")
    with pytest.raises(NoTrialError, match=r"no trial of the search for baseline plain completed.* --trials N$"):
        sweep._need_bests_of_further_searches()
    assert not sweep._is_made(search)
