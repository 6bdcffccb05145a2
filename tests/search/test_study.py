"""The study: how trials end, early stopping, resume. No cluster."""

from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState
from support import changed

from cps_ray.config.sweep import SweepConfig
from cps_ray.config.train import TrainConfig
from cps_ray.search.records import trial_row
from cps_ray.search.study import SweepStudy


@pytest.fixture
def config(tiny: TrainConfig, tmp_path: Path) -> SweepConfig:
    train = changed(tiny, schedule__steps=8, schedule__eval_every=2)
    return SweepConfig.model_validate(
        {
            "version": 1,
            "name": "s",
            "output": str(tmp_path),
            "train": train.dump(),
            "budget": {"trials": 6},
            "sampler": {"startup_trials": 2},
            "early_stopping": {"type": "asha", "grace": 2, "reduction": 2},
            "search_space": {
                "cps.weight": {"type": "float", "low": 0.1, "high": 10.0, "log": True},
                "cps.mix": {"type": "choice", "values": ["none", "cutmix"]},
                "cps.cutmix_boxes": {"type": "int", "low": 1, "high": 5, "when": {"cps.mix": "cutmix"}},
            },
            "enqueue": [{"cps.weight": 3.0, "cps.mix": "none"}],
        }
    )


def report(study: SweepStudy, number: int, step: int, value: float) -> bool:
    """Reports an evaluation; False if the trial is to be stopped."""
    study.report(number, step, value)
    return not study.should_prune(number)


def train_to(study: SweepStudy, number: int, values: list[float]) -> bool:
    """Reports every 2 steps; False if the trial was stopped."""
    return all(report(study, number, 2 * n, value) for n, value in enumerate(values, start=1))


def test_the_drawn_value_is_the_trainings_value(config: SweepConfig, tmp_path: Path) -> None:
    study = SweepStudy(config, tmp_path)
    for _ in range(6):
        found = study.ask()
        assert found is not None
        number, train = found
        params = study.study.trials[number].params
        assert train.cps.weight == params["cps.weight"]
        assert train.cps.mix == params["cps.mix"]
        assert train.cps.cutmix_boxes == params.get("cps.cutmix_boxes", config.train.cps.cutmix_boxes)
    assert study.ask() is None, "the budget of trials is used up"


def test_the_files_own_values_come_first_then_enqueued_points(config: SweepConfig, tmp_path: Path) -> None:
    study = SweepStudy(config, tmp_path)
    first, second = study.ask(), study.ask()
    assert first is not None
    assert second is not None
    assert first[1] == config.train
    assert study.trial(0).params == {"cps.weight": 1.0, "cps.mix": "cutmix", "cps.cutmix_boxes": 3}
    assert (second[1].cps.weight, second[1].cps.mix) == (3.0, "none")


def test_a_point_that_is_the_files_own_is_not_run_twice(config: SweepConfig, tmp_path: Path) -> None:
    own = {"cps.weight": 1, "cps.mix": "cutmix", "cps.cutmix_boxes": 3}
    study = SweepStudy(config.model_copy(update={"enqueue": [own, *config.enqueue]}), tmp_path)
    for _ in range(3):
        study.ask()
    assert [trial.params["cps.weight"] for trial in study.trials][:2] == [1.0, 3.0]
    assert study.trial(2).params != own


@pytest.mark.parametrize("killed_at", ["enqueue_trial", "set_metric_names", "set_user_attr"])
def test_a_study_whose_making_was_cut_off_is_made_anew(
    config: SweepConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed_at: str
) -> None:
    real, calls = getattr(optuna.Study, killed_at), []

    def die_at_the_second(*args: object, **kwargs: object) -> None:
        calls.append(1)
        if len(calls) == 2 or killed_at != "enqueue_trial":
            raise KeyboardInterrupt
        real(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(optuna.Study, killed_at, die_at_the_second)
        with pytest.raises(KeyboardInterrupt):
            SweepStudy(config, tmp_path)
    for _ in range(2):  # the second time it is whole
        study = SweepStudy(config, tmp_path)
        assert [trial.state for trial in study.study.trials] == [TrialState.WAITING] * 2
        assert study.study.metric_names == ["val/miou"]


def test_patience_ends_the_search_and_a_larger_one_goes_on(config: SweepConfig, tmp_path: Path) -> None:
    budget = config.budget.model_copy(update={"trials": 20, "patience": 3})
    config = config.model_copy(update={"budget": budget})
    study = SweepStudy(config, tmp_path)
    study.ask()
    assert study.tell(0, failure="x") == "failed"  # before there is a best one it does not count
    for number, value in enumerate((0.5, 0.6, 0.6), start=1):
        study.ask()
        train_to(study, number, [value] * 4)
        study.tell(number, failure=None)
    study.ask()
    study.ask()
    train_to(study, 4, [0.1])
    assert study.tell(4, failure=None) == "pruned"
    assert not study.is_stalled
    study.tell(5, failure="x")
    for again in (study, SweepStudy(config, tmp_path)):
        assert again.is_stalled
        assert again.ask() is None
        assert again.why_no_more == "budget.patience: 3 trials have ended without a better value"
    larger = config.model_copy(update={"budget": budget.model_copy(update={"patience": 4})})
    study = SweepStudy(larger, tmp_path)
    assert not study.why_no_more
    found = study.ask()
    assert found is not None
    assert found[0] == 6
    train_to(study, 6, [0.7] * 4)
    study.tell(6, failure=None)
    assert study.ask() is not None, "it was better"


def test_a_grid_is_searched_once_also_by_sessions_that_are_cut_off(config: SweepConfig, tmp_path: Path) -> None:
    space = {
        "cps.weight": {"type": "choice", "values": [1.0, 2.0]},
        "cps.mix": {"type": "choice", "values": ["none", "cutmix"]},
        "cps.cutmix_boxes": {"type": "int", "low": 1, "high": 3, "when": {"cps.mix": "cutmix"}},
        "augment.scale": {"type": "choice", "values": [[0.5, 2], [0.75, 1.5]]},
    }
    raw = config.model_dump(mode="json") | {
        "search_space": space,
        "sampler": {"type": "grid"},
        "budget": {"trials": 99},
    }
    config = SweepConfig.model_validate({**raw, "enqueue": [{"cps.mix": "none", "augment.scale": [0.75, 1.5]}]})
    study = SweepStudy(config, tmp_path)
    while study.ask() is not None:
        study = SweepStudy(config, tmp_path)  # it left the trial unfinished
        found = study.ask()
        assert found is not None
        train_to(study, found[0], [0.5] * 4)
        study.tell(found[0], failure=None)
    points = [trial.params for trial in study.trials]
    assert points[0] == {"cps.weight": 1.0, "cps.mix": "cutmix", "cps.cutmix_boxes": 3, "augment.scale": [0.5, 2]}
    assert (points[1]["cps.mix"], points[1]["augment.scale"]) == ("none", [0.75, 1.5])
    assert len(points) == len({str(sorted(point.items())) for point in points}) == 2 * 4 * 2
    assert study.why_no_more == "all 16 points of the grid have begun"
    assert not SweepStudy(config, tmp_path).study.get_trials(states=[TrialState.WAITING])


def test_lists_and_null_are_searched_resumed_and_shown(config: SweepConfig, tmp_path: Path) -> None:
    space = {
        "augment.scale": {"type": "choice", "values": [[0.5, 2], [0.75, 1.5]]},
        "ema.decay": {"type": "choice", "values": [None, 0.9]},
        "cps.weight": {"type": "float", "low": 0.5, "high": 1.5, "when": {"augment.scale": [[0.5, 2]]}},
    }
    raw = config.model_dump(mode="json") | {"search_space": space, "sampler": {"startup_trials": 2}}
    config = SweepConfig.model_validate({**raw, "enqueue": [{"augment.scale": [0.75, 1.5], "ema.decay": 0.9}]})
    study = SweepStudy(config, tmp_path)
    for number in range(6):
        found = study.ask()
        assert found is not None
        params = study.trial(number).params
        assert list(found[1].augment.scale) == params["augment.scale"]
        assert found[1].ema.decay == params["ema.decay"]
        train_to(study, number, [0.1 * number] * 4)
        study.tell(number, failure=None)
    again = SweepStudy(config, tmp_path)
    again.check_space(lambda loc: "")
    assert [trial.params for trial in again.trials] == [trial.params for trial in study.trials]
    rows = [trial_row(trial, config) for trial in again.trials[:2]]
    assert [(row["params.augment.scale"], row["params.ema.decay"]) for row in rows] == [
        ("[0.5, 2]", "null"),
        ("[0.75, 1.5]", "0.9"),
    ]
    assert "params.cps.weight" in rows[1]
    assert rows[1]["params.cps.weight"] is None


def test_a_finished_trial_has_its_best_value(config: SweepConfig, tmp_path: Path) -> None:
    study = SweepStudy(config, tmp_path)
    study.ask()
    assert train_to(study, 0, [0.2, 0.5, 0.4, 0.3])
    assert study.tell(0, failure=None) == "complete"
    assert study.study.trials[0].value == 0.5
    assert study.best().number == 0


def test_the_last_value_if_asked_for(config: SweepConfig, tmp_path: Path) -> None:
    last = config.model_copy(update={"objective": config.objective.model_copy(update={"select": "last"})})
    study = SweepStudy(last, tmp_path)
    study.ask()
    train_to(study, 0, [0.2, 0.5, 0.4, 0.3])
    study.tell(0, failure=None)
    assert study.study.trials[0].value == 0.3


def test_asha_prunes_the_worse_half_and_keeps_its_curve(config: SweepConfig, tmp_path: Path) -> None:
    study = SweepStudy(config, tmp_path)
    for _ in range(3):
        study.ask()
    assert train_to(study, 0, [0.5])
    assert train_to(study, 1, [0.6])
    assert not train_to(study, 2, [0.1])
    assert study.tell(2, failure=None) == "pruned"
    assert study.study.trials[2].intermediate_values == {2: 0.1}


def test_one_noisy_evaluation_at_a_rung_does_not_end_a_good_trial(config: SweepConfig, tmp_path: Path) -> None:
    study = SweepStudy(config, tmp_path)
    for _ in range(2):
        study.ask()
    assert train_to(study, 0, [0.5, 0.55])
    assert train_to(study, 1, [0.7, 0.1]), "its best, 0.7, is the better one at the rung of step 4"
    assert study.study.trials[1].intermediate_values == {2: 0.7, 4: 0.7}
    study.report(1, 8, 0.2)
    study.tell(1, failure=None)
    assert study.study.trials[1].user_attrs["score_last"] == 0.2


def test_a_trial_is_never_pruned_at_its_last_step(config: SweepConfig, tmp_path: Path) -> None:
    study = SweepStudy(config, tmp_path)
    for _ in range(2):
        study.ask()
    train_to(study, 0, [0.5, 0.6, 0.7, 0.9])
    study.tell(0, failure=None)
    assert report(study, 1, 8, 0.1)


@pytest.mark.parametrize(("values", "failure"), [([0.5, 0.6], "boom"), ([], None), ([float("nan")], None)])
def test_crashes_and_nan_are_failures(
    config: SweepConfig, tmp_path: Path, values: list[float], failure: str | None
) -> None:
    study = SweepStudy(config, tmp_path)
    study.ask()
    train_to(study, 0, values)
    assert study.tell(0, failure=failure) == "failed"
    assert study.best() is None
    assert study.failures() == (1, 1)


def collapse(study: SweepStudy, number: int, values: list[float], failure: str = "one class takes all") -> str:
    train_to(study, number, values)
    return study.tell(number, failure=failure, collapsed=True)


def test_a_collapsed_trial_has_the_worst_value_and_its_reason_and_is_never_the_best(
    config: SweepConfig, tmp_path: Path
) -> None:
    study = SweepStudy(config, tmp_path)
    for _ in range(3):
        study.ask()
    assert collapse(study, 0, [0.9, 0.9, 0.9]) == "collapsed"
    assert collapse(study, 1, []) == "collapsed", "its loss may be infinite before any evaluation"
    assert study.best() is None
    told = study.study.trials[0]
    assert (told.state, told.value, told.user_attrs["failure"]) == (TrialState.COMPLETE, 0.0, "one class takes all")
    assert study.failures() == (2, 2)
    train_to(study, 2, [0.0, 0.0, 0.0, 0.0])
    study.tell(2, failure=None)
    assert study.best().number == 2, "of equal values only one is a result"
    # Another session reads the same.
    again = SweepStudy(config, tmp_path)
    assert again.counts() == {"complete": 1, "pruned": 0, "collapsed": 2, "failed": 0, "running": 0}
    assert again.best().number == 2
    assert again.failures() == (2, 0)


@pytest.mark.parametrize("pruner", ["asha", "median"])
def test_the_curve_of_a_collapsed_trial_sets_no_bar(config: SweepConfig, tmp_path: Path, pruner: str) -> None:
    stopping = config.early_stopping.model_copy(update={"type": pruner})
    study = SweepStudy(config.model_copy(update={"early_stopping": stopping}), tmp_path)
    for _ in range(6):
        study.ask()
    for number in range(5):  # five, as the median wants to see some trials first
        collapse(study, number, [0.7 + 0.01 * number], "the loss is not finite")
    assert train_to(study, 5, [0.5, 0.5, 0.5, 0.5]), "good early values of those are no reason to stop this one"


@pytest.mark.parametrize(("collapsed", "fewest", "most"), [(True, 0, 12), (False, 15, 20)])
def test_the_sampler_leaves_a_region_that_collapses(
    config: SweepConfig, tmp_path: Path, collapsed: bool, fewest: int, most: int
) -> None:
    """Beyond a weight of 2, a third of the range, every training collapses. Told FAIL, which TPE does not read, most of the proposals
    go there: where nothing is known to it, it looks."""
    space = {"cps.weight": config.search_space["cps.weight"]}
    budget = config.budget.model_copy(update={"trials": 30})
    sampler = config.sampler.model_copy(update={"startup_trials": 10})
    changes = {"search_space": space, "budget": budget, "sampler": sampler, "enqueue": []}
    study = SweepStudy(config.model_copy(update=changes), tmp_path)
    collapses = []
    for number in range(30):
        _, train = study.ask()
        collapses.append(train.cps.weight > 2)
        if collapses[-1]:
            study.tell(number, failure="one class takes all", collapsed=collapsed)
        else:
            study.report(number, 8, 0.3 + 0.1 * train.cps.weight)
            study.tell(number, failure=None)
    assert fewest <= sum(collapses[10:]) <= most, f"{sum(collapses[10:])} of 20 proposals"


def test_a_trial_that_goes_on_after_a_crash_is_complete(
    config: SweepConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The driver is killed after it has noted why the trial failed, and before the trial has ended by it."""
    study = SweepStudy(config, tmp_path)
    number, train = study.ask()
    with monkeypatch.context() as patch:
        patch.setattr(study.study, "tell", None)
        with pytest.raises(TypeError):
            study.tell(number, failure="a worker died")
    study = SweepStudy(config, tmp_path)
    study.ask()
    report(study, number, train.schedule.steps, 0.5)
    assert study.tell(number, failure=None) == "complete"
    trial = SweepStudy(config, tmp_path).trial(number)
    assert (trial.state, trial.failure, trial.value) == ("complete", None, 0.5)


def test_failures_in_a_row_end_with_a_success(config: SweepConfig, tmp_path: Path) -> None:
    study = SweepStudy(config, tmp_path)
    for number, failure in enumerate(["x", "x", None, "x"]):
        study.ask()
        if failure is None:
            train_to(study, number, [0.1, 0.2, 0.3, 0.4])
        study.tell(number, failure=failure)
    assert study.failures() == (3, 1)


def test_a_new_session_goes_on_where_the_old_one_stopped(config: SweepConfig, tmp_path: Path) -> None:
    first = SweepStudy(config, tmp_path)
    points = []
    for _ in range(3):
        number, train = first.ask()
        points.append((number, train))
    train_to(first, 0, [0.5, 0.6, 0.7, 0.8])
    first.tell(0, failure=None)
    train_to(first, 1, [0.6])

    second = SweepStudy(config, tmp_path)
    assert second.counts() == {"complete": 1, "pruned": 0, "collapsed": 0, "failed": 0, "running": 2}
    # The unfinished ones come back with their numbers and points, then new ones.
    assert [second.ask() for _ in range(2)] == points[1:]
    assert report(second, 1, 2, 0.6), "a step heard before is not news"
    # ASHA remembers its rungs: two values at step 2 are on disk, this one is the worst of three.
    assert not report(second, 2, 2, 0.1)
    assert second.ask()[0] == 3


def test_a_resumed_trial_is_not_stopped_at_a_step_that_it_had_passed(config: SweepConfig, tmp_path: Path) -> None:
    median = config.model_copy(update={"early_stopping": config.early_stopping.model_copy(update={"type": "median"})})
    first = SweepStudy(median, tmp_path)
    for _ in range(5):
        first.ask()
    assert report(first, 0, 2, 0.1), "nothing to compare with yet"
    for number in range(1, 5):
        train_to(first, number, [0.5, 0.6, 0.7, 0.8])
        first.tell(number, failure=None)

    second = SweepStudy(median, tmp_path)
    number, _ = second.ask()
    assert number == 0
    assert report(second, 0, 2, 0.1), "a repeated step decides nothing, though by now its value is below the median"
    assert not report(second, 0, 4, 0.1)


def test_a_resumed_sampler_does_not_repeat_itself(config: SweepConfig, tmp_path: Path) -> None:
    random = config.model_copy(update={"sampler": config.sampler.model_copy(update={"type": "random"})})
    for _ in range(2):
        study = SweepStudy(random, tmp_path)
        for _ in range(3):
            number, _ = study.ask()
            study.tell(number, failure="x")
    weights = [t.params["cps.weight"] for t in study.trials]
    assert len(set(weights)) == 6


@pytest.mark.parametrize("name", ["tpe", "random", "qmc", "gp", "cmaes"])
def test_what_is_drawn_does_not_depend_on_interruptions(config: SweepConfig, tmp_path: Path, name: str) -> None:
    config = config.model_copy(update={"sampler": config.sampler.model_copy(update={"type": name})})
    points = []
    for interrupted in (False, True):
        folder = tmp_path / str(interrupted)
        folder.mkdir()
        study = SweepStudy(config, folder)
        for number in range(6):
            study.ask()
            if interrupted:  # by a session that goes on with the trial that this one has begun
                study = SweepStudy(config, folder)
                study.ask()
            train_to(study, number, [0.1 * number] * 4)
            study.tell(number, failure=None)
        points.append([trial.params for trial in study.trials])
    assert points[0] == points[1]
    assert len({str(point) for point in points[0]}) == 6


def test_a_resumed_trial_whose_records_were_lost_keeps_its_best(config: SweepConfig, tmp_path: Path) -> None:
    study = SweepStudy(config, tmp_path)
    study.ask()
    train_to(study, 0, [0.2, 0.5])
    study = SweepStudy(config, tmp_path)
    study.ask()
    assert report(study, 0, 6, 0.3)
    assert report(study, 0, 8, 0.3)
    assert study.tell(0, failure=None) == "complete"
    assert study.study.trials[0].intermediate_values == {2: 0.2, 4: 0.5, 6: 0.5, 8: 0.5}


@pytest.mark.parametrize("name", ["tpe", "random", "qmc", "gp", "cmaes"])
def test_every_sampler_draws(config: SweepConfig, tmp_path: Path, name: str) -> None:
    changed_config = config.model_copy(update={"sampler": config.sampler.model_copy(update={"type": name})})
    study = SweepStudy(changed_config, tmp_path)
    for number in range(5):
        study.ask()
        train_to(study, number, [0.1 * number] * 4)
        study.tell(number, failure=None)


def test_the_study_opens_with_optuna_alone(config: SweepConfig, tmp_path: Path) -> None:
    study = SweepStudy(config, tmp_path)
    study.ask()
    train_to(study, 0, [0.2, 0.5, 0.4, 0.3])
    study.tell(0, failure=None)
    opened = optuna.load_study(study_name="s", storage=f"sqlite:///{tmp_path / 'study.db'}")
    assert opened.best_value == 0.5


@pytest.mark.parametrize(
    "name", ["%2F", "we ird%2F[v2]?#é", "a:b c", "q?mode=ro", "file:x", "人行道", "%%s", "&=+;'\"$"]
)
def test_the_study_lies_in_its_folder_whatever_that_is_called(config: SweepConfig, tmp_path: Path, name: str) -> None:
    folder = tmp_path / name
    folder.mkdir()
    study = SweepStudy(config, folder)
    study.ask()
    assert [path.name for path in folder.iterdir()] == ["study.db"]
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert SweepStudy(config, folder).counts()["running"] == 1


@pytest.mark.filterwarnings("ignore:Inconsistent parameter values")  # a trial that goes on keeps its value
def test_other_bounds_are_taken_in_a_new_session(config: SweepConfig, tmp_path: Path) -> None:
    study = SweepStudy(config, tmp_path)
    for _ in range(2):
        study.ask()
    space = dict(config.search_space)
    space["cps.weight"] = space["cps.weight"].model_copy(update={"low": 0.01, "high": 2.0})
    study = SweepStudy(config.model_copy(update={"search_space": space}), tmp_path)
    study.check_space(lambda loc: "")
    for _ in range(3):
        assert study.ask() is not None


def test_a_trial_that_cannot_be_drawn_does_not_stay_running(
    config: SweepConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise ValueError("CategoricalDistribution does not support dynamic value space.")

    study = SweepStudy(config, tmp_path)
    monkeypatch.setattr("cps_ray.search.study.draw", refuse)
    with pytest.raises(ValueError, match="dynamic"):
        study.ask()
    assert study.counts()["running"] == 0
    assert study.counts()["failed"] == 1
