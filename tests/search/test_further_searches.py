from pathlib import Path
from typing import Any

import pytest

from cps_ray.config.sweep import SweepConfig
from cps_ray.config.train import TrainConfig
from cps_ray.errors import ConfigError
from cps_ray.results import resume_command
from cps_ray.search.final_phase import plan_final_runs
from cps_ray.search.further_searches import (
    baseline_folder,
    baseline_sweep,
    further_searches,
    open_study,
    searched,
)
from cps_ray.search.search_phase import best_config
from cps_ray.search.study import SweepStudy

SPACE = {
    "cps.weight": {"type": "float", "low": 0.5, "high": 2.0},
    "optim.lr": {"type": "float", "low": 0.001, "high": 0.1},
    "model.encoder": {"type": "choice", "values": ["tu-test_efficientnet", "tu-test_byobnet"]},
    "optim.weight_decay": {
        "type": "float",
        "low": 0.0,
        "high": 0.1,
        "when": {"model.encoder": "tu-test_byobnet"},
    },
}


def sweep(tiny: TrainConfig, root: Path, **baseline: Any) -> SweepConfig:
    return SweepConfig.model_validate(
        {
            "version": 1,
            "name": "s",
            "output": str(root),
            "train": tiny.dump(),
            "budget": {"trials": 3},
            "sampler": {"type": "random"},
            "early_stopping": {"type": "none"},
            "search_space": SPACE,
            "baselines": {"plain": {"method": "supervised", **baseline}},
            "final": {"seeds": [1]},
        }
    )


def run(study: SweepStudy, values: list[float]) -> None:
    for value in values:
        found = study.ask()
        assert found is not None
        study.report(found[0], study.config.train.schedule.steps, value)
        study.tell(found[0], failure=None)


def test_a_baseline_is_searched_from_the_best_on_with_as_many_trials(tiny: TrainConfig, tmp_path: Path) -> None:
    config = sweep(tiny, tmp_path, search=["optim.lr"])
    assert searched(config) == ["plain"]
    study = SweepStudy(config, tmp_path)
    run(study, [0.1, 0.3, 0.2])
    best = best_config(study, config)
    own = baseline_sweep(config, "plain", best, study.best().params, 3)
    assert (own.budget.trials, [*own.search_space]) == (3, ["optim.lr"])
    assert own.train.method == "supervised"
    assert own.train.model.encoder == best.model.encoder
    of_baseline = open_study(tmp_path, own, baseline_folder(tmp_path, "plain"))
    number, first = of_baseline.ask()
    assert (number, first.optim.lr) == (0, best.optim.lr), "what the best has is tried first"
    of_baseline.report(0, first.schedule.steps, 0.25)
    of_baseline.tell(0, failure=None)
    run(of_baseline, [0.4, 0.3])
    assert of_baseline.ask() is None
    assert of_baseline.best().number == 1
    again = SweepStudy(config, tmp_path)
    assert (again.best().number, len(again.trials)) == (1, 3), "the sweep's own study knows nothing of it"
    assert len(open_study(tmp_path, own, baseline_folder(tmp_path, "plain")).trials) == 3


def test_another_best_begins_the_search_anew_unless_it_differs_only_in_what_is_searched(
    tiny: TrainConfig, tmp_path: Path
) -> None:
    config = sweep(tiny, tmp_path, search=["optim.lr"])
    point = {"cps.weight": 1.0, "optim.lr": 0.01, "model.encoder": "tu-test_efficientnet"}

    def num_trials(**changes: Any) -> int:
        new = {**point, **{name.replace("__", "."): value for name, value in changes.items()}}
        best = config.train.model_copy(
            update={
                "optim": config.train.optim.model_copy(update={"lr": new["optim.lr"]}),
                "model": config.train.model.model_copy(update={"encoder": new["model.encoder"]}),
                "cps": config.train.cps.model_copy(update={"weight": new["cps.weight"]}),
            }
        )
        return len(
            open_study(
                tmp_path, baseline_sweep(config, "plain", best, new, 3), baseline_folder(tmp_path, "plain")
            ).trials
        )

    assert num_trials() == 0
    own = baseline_sweep(config, "plain", config.train, point, 3)
    run(open_study(tmp_path, own, baseline_folder(tmp_path, "plain")), [0.1])
    folder = baseline_folder(tmp_path, "plain")
    (folder / "trials").mkdir(parents=True)
    assert num_trials(optim__lr=0.05, cps__weight=2.0) == 1, "one is searched, the other one's method is not used"
    assert num_trials(model__encoder="tu-test_byobnet") == 0
    assert not folder.exists()


def test_a_study_that_was_opened_before_the_election_begins_with_the_elected(tiny: TrainConfig, tmp_path: Path) -> None:
    config = sweep(tiny, tmp_path, search=["optim.lr"])
    folder = baseline_folder(tmp_path, "plain")
    for rate in (0.01, 0.05):
        point = {"cps.weight": 1.0, "optim.lr": rate, "model.encoder": "tu-test_efficientnet"}
        best = config.train.model_copy(update={"optim": config.train.optim.model_copy(update={"lr": rate})})
        own = baseline_sweep(config, "plain", best, point, 3)
        if rate == 0.01:
            SweepStudy(own, tmp_path, home=folder)  # as who looks whether it has a best trial
    first = open_study(tmp_path, own, folder).ask()
    assert first is not None
    assert first[1].optim.lr == 0.05


def test_what_is_searched_may_be_of_a_method_that_is_not_used(tiny: TrainConfig, tmp_path: Path) -> None:
    config = sweep(tiny, tmp_path, search=["optim.lr", "cps.weight"])
    point = {"cps.weight": 1.0, "optim.lr": 0.01, "model.encoder": "tu-test_efficientnet"}
    own = baseline_sweep(config, "plain", config.train, point, 3)
    run(open_study(tmp_path, own, baseline_folder(tmp_path, "plain")), [0.1])
    assert len(open_study(tmp_path, own, baseline_folder(tmp_path, "plain")).trials) == 1


def test_what_a_searched_parameter_depends_on_is_the_best_ones(tiny: TrainConfig, tmp_path: Path) -> None:
    config = sweep(tiny, tmp_path, search=["optim.weight_decay", "optim.lr"])
    for encoder, names in (
        ("tu-test_byobnet", ["optim.weight_decay", "optim.lr"]),
        ("tu-test_efficientnet", ["optim.lr"]),
    ):
        point = {"cps.weight": 1.0, "optim.lr": 0.01, "model.encoder": encoder}
        found = baseline_sweep(config, "plain", config.train, point, 3).search_space
        assert {*found} == {*names}
        assert all(param.when is None for param in found.values())
    both = sweep(tiny, tmp_path, search=["model.encoder", "optim.weight_decay"])
    found = baseline_sweep(both, "plain", both.train, {"model.encoder": "tu-test_efficientnet"}, 3).search_space
    assert found["optim.weight_decay"].when == {"model.encoder": "tu-test_byobnet"}


@pytest.mark.parametrize(
    ("baseline", "text"),
    [
        ({"trials": 3}, "there is none"),
        ({"search": ["optim.lr"], "train_on": "labeled+val"}, "needs val to choose by"),
        ({"search": ["optim.lr"], "trials": 0}, "trials: must be at least 1|trials: must be greater than 0"),
        ({"train_on": "val"}, "train_on: must be"),
    ],
)
def test_what_a_baseline_cannot_be(tiny: TrainConfig, tmp_path: Path, baseline: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        sweep(tiny, tmp_path, **baseline).baseline("plain")


def test_with_folds_a_baseline_is_searched_on_the_first_one(tiny: TrainConfig, tmp_path: Path) -> None:
    config = sweep(tiny, tmp_path, search=["optim.lr"])
    config = config.model_copy(update={"final": config.final.model_copy(update={"folds": 3})})
    study = SweepStudy(config, tmp_path)
    run(study, [0.1])
    own = baseline_sweep(config, "plain", best_config(study, config), study.best().params, 1)
    _, trial = open_study(tmp_path, own, baseline_folder(tmp_path, "plain")).ask()
    assert trial.data.folds.held_out == 0, "else it would be trained on what it is chosen by"


def test_what_depends_on_a_parameter_that_the_best_has_not_is_left_out(tiny: TrainConfig, tmp_path: Path) -> None:
    space = {
        **SPACE,
        "optim.clip_norm": {"type": "float", "low": 0.5, "high": 1.0, "when": {"optim.weight_decay": 0.0}},
    }
    config = SweepConfig.model_validate(sweep(tiny, tmp_path).model_dump() | {"search_space": space})
    changes = {"plain": {"method": "supervised", "search": ["optim.clip_norm", "optim.weight_decay"]}}
    config = config.model_copy(update={"baselines": changes})
    point = {"cps.weight": 1.0, "optim.lr": 0.01, "model.encoder": "tu-test_efficientnet"}
    assert baseline_sweep(config, "plain", config.train, point, 3).search_space == {}


def test_a_sweep_folder_that_was_moved_keeps_its_baselines_search(tiny: TrainConfig, tmp_path: Path) -> None:
    def own(folder: Path) -> SweepConfig:
        data = tiny.data.model_copy(update={"shards": folder / "shards"})
        config = sweep(tiny.model_copy(update={"data": data}), folder, search=["optim.lr"])
        return baseline_sweep(config, "plain", config.train, {"optim.lr": 0.01}, 3)

    before, after = tmp_path / "before", tmp_path / "after"
    before.mkdir()
    run(open_study(before, own(before), baseline_folder(before, "plain")), [0.1])
    before.rename(after)
    assert len(open_study(after, own(after), baseline_folder(after, "plain")).trials) == 1


def test_nested_each_fold_is_searched_without_itself_and_tested_with_what_that_has_found(
    tiny: TrainConfig, tmp_path: Path
) -> None:
    config = sweep(tiny, tmp_path, search=["optim.lr"])
    nested = config.model_dump() | {"final": {"folds": 3, "nested": True}}
    config = SweepConfig.model_validate(nested)
    study = SweepStudy(config, tmp_path)
    asides = []

    def search(study: SweepStudy, values: list[float]) -> None:
        for value in values:
            number, trial = study.ask()
            asides.append((trial.data.folds.held_out, trial.data.folds.aside))
            study.report(number, trial.schedule.steps, value)
            study.tell(number, failure=None)

    search(study, [0.1, 0.3, 0.2])
    assert {*asides} == {(1, 0)}, "what the first fold tests is chosen by the second one"
    named = [str(each) for each in further_searches(tmp_path, config, study)]
    assert named == ["baseline plain", "fold 2", "fold 3"], "what a fold's baseline begins with is not found yet"
    found = {}
    for each in further_searches(tmp_path, config, study):
        asides.clear()
        own = open_study(tmp_path, each.sweep, each.folder)
        search(own, [0.1, 0.2, 0.4] if each.repeat == 2 else [0.4, 0.2, 0.1])
        assert {*asides} == {(each.repeat % 3, each.repeat - 1)}
        found[each.arm, each.repeat] = own
    assert [
        (each.prefix, str(each.folder.relative_to(tmp_path))) for each in further_searches(tmp_path, config, study)
    ] == [
        ("plain-", "baselines/plain"),
        ("fold2-", "folds/2"),
        ("plain-fold2-", "folds/2/baselines/plain"),
        ("fold3-", "folds/3"),
        ("plain-fold3-", "folds/3/baselines/plain"),
    ]
    of_third = found["best", 3], found["plain", 3]
    best, second, third = (best_config(one, one.config) for one in (study, found["best", 2], of_third[0]))
    tuned = {("plain", 1): {"optim.lr": 0.011}, ("plain", 3): {"optim.lr": 0.033}}
    runs = plan_final_runs(tmp_path, config, best, 1, tuned, {2: second, 3: third})
    trained = {run.job.name: run.job.config for run in runs}
    folds = {name: (each.data.folds.held_out, each.data.folds.aside) for name, each in trained.items()}
    assert folds["best-fold1"] == folds["plain-fold1"] == (0, None)
    assert folds["best-fold3"] == folds["plain-fold3"] == (2, None)
    assert folds["best-all"] == (None, None)
    rates = {name: each.optim.lr for name, each in trained.items()}
    assert rates["best-fold1"] == rates["best-all"] == best.optim.lr
    assert (rates["best-fold2"], rates["best-fold3"]) == (second.optim.lr, third.optim.lr)
    assert len({best.optim.lr, second.optim.lr, third.optim.lr}) == 3
    assert (rates["plain-fold1"], rates["plain-fold3"]) == (0.011, 0.033)
    assert rates["plain-fold2"] == second.optim.lr, "its search has found nothing else"
    assert trained["plain-fold2"].model == second.model


def test_a_search_in_a_search_resumes_the_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folds").mkdir()
    root = tmp_path / "folds" / "mine"
    inside = root / "folds" / "2" / "baselines" / "plain"
    inside.mkdir(parents=True)
    (root / ".begun.json").write_text('{"address": "1.2.3.4:6379"}')
    assert resume_command(inside) == resume_command(root)
    assert resume_command(root).endswith("sweep resume folds/mine --address 1.2.3.4:6379"), (
        "it lies in a folder of that name"
    )


def test_a_baseline_may_be_called_as_a_fold_is(tiny: TrainConfig, tmp_path: Path) -> None:
    config = sweep(tiny, tmp_path, search=["optim.lr"])
    both = {"fold2": config.baselines["plain"], "folds": config.baselines["plain"]}
    config = SweepConfig.model_validate(
        config.model_dump() | {"baselines": both, "final": {"folds": 3, "nested": True}}
    )
    study = SweepStudy(config, tmp_path)
    run(study, [0.1, 0.3, 0.2])
    for _ in range(2):
        for each in further_searches(tmp_path, config, study):
            own = open_study(tmp_path, each.sweep, each.folder)
            if not own.why_no_more:
                run(own, [0.1, 0.2, 0.4])
            assert len(own.trials) == 3
    names = [each.sweep.name for each in further_searches(tmp_path, config, study)]
    assert len({*names}) == len(names) == 2 + 2 * 3


def test_a_sweep_that_goes_on_with_other_data_keeps_its_further_searches(tiny: TrainConfig, tmp_path: Path) -> None:
    def own(fingerprint: str) -> SweepConfig:
        data = tiny.data.model_copy(update={"fingerprint": {"train": f"1-{fingerprint * 32}"}})
        config = sweep(tiny.model_copy(update={"data": data}), tmp_path, search=["optim.lr"])
        return baseline_sweep(config, "plain", config.train, {"optim.lr": 0.01}, 3)

    run(open_study(tmp_path, own("0"), baseline_folder(tmp_path, "plain")), [0.1])
    assert len(open_study(tmp_path, own("1"), baseline_folder(tmp_path, "plain")).trials) == 1
