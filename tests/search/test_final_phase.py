import json
from pathlib import Path
from typing import Any

import pytest

from cps_ray.config.sweep import SweepConfig
from cps_ray.config.train import HELD_OUT, TrainConfig
from cps_ray.on_ray.evaluate_runs import CheckpointScores
from cps_ray.runs import META_FILE, STATE_FILE
from cps_ray.search import final_phase
from cps_ray.search.final_phase import (
    FinalRun,
    best_arm_config,
    counting_checkpoint,
    evaluate_final_runs,
    plan_candidates,
    plan_final_runs,
    validation,
)
from cps_ray.search.study import SweepStudy


def sweep(tiny: TrainConfig, root: Path, **final: Any) -> SweepConfig:
    return SweepConfig.model_validate(
        {
            "version": 1,
            "name": "s",
            "output": str(root),
            "train": tiny.dump(),
            "budget": {"trials": 4},
            "sampler": {"type": "random"},
            "early_stopping": {"type": "none"},
            "search_space": {"optim.lr": {"type": "float", "low": 0.001, "high": 0.1}},
            "baselines": {
                "plain": {"method": "supervised"},
                "with-val": {"method": "supervised", "train_on": "labeled+val"},
            },
            "final": {"seeds": [1, 2], **final},
        }
    )


def plan(config: SweepConfig, number: int = 0) -> dict[str, FinalRun]:
    runs = plan_final_runs(Path(), config, config.train, number, {("plain", 1): {"optim.lr": 0.5}})
    assert len(runs) == config.num_final_runs - len(config.final.repeats) * (config.final.top - 1)
    return {run.job.name: run for run in runs}


def test_arms_are_paired_and_a_tuned_baseline_has_its_own_values(tiny: TrainConfig, tmp_path: Path) -> None:
    runs = plan(sweep(tiny, tmp_path))
    assert [*runs] == [f"{arm}-seed{n}" for arm in ("best", "plain", "with-val") for n in (1, 2)]
    best, plain, with_val = (runs[f"{arm}-seed2"].job.config for arm in ("best", "plain", "with-val"))
    assert (best.seed, plain.seed, plain.optim.lr) == (2, 2, 0.5)
    assert with_val.data.further_labeled == ("val",)
    assert with_val.optim.lr == best.optim.lr
    assert [run.is_last_step for run in runs.values()] == [False] * 4 + [True] * 2


def test_draws_differ_in_their_labels(tiny: TrainConfig, tmp_path: Path) -> None:
    runs = plan(sweep(tiny, tmp_path, draws=3))
    assert [*runs][:3] == ["best-draw1", "best-draw2", "best-draw3"]
    configs = [runs[f"{arm}-draw3"].job.config for arm in ("best", "plain")]
    assert [(config.seed, config.data.subset_seed) for config in configs] == [(3, 3), (3, 3)]


def test_folds_are_held_out_in_turn_and_the_last_training_has_all_labels(tiny: TrainConfig, tmp_path: Path) -> None:
    runs = plan(sweep(tiny, tmp_path, folds=3, group_by="^(seq)"))
    *of_folds, whole = runs.values()
    assert [run.job.config.data.folds.held_out for run in of_folds] == [0, 1, 2] * 3
    assert {run.job.config.data.folds.group_by for run in runs.values()} == {"^(seq)"}
    assert {run.split for run in of_folds} == {HELD_OUT}
    assert all(run.is_last_step for run in runs.values())
    assert (whole.job.name, whole.job.config.data.folds.held_out, whole.split) == ("best-all", None, None)


def test_the_curve_has_fewer_labels_and_fewer_images(tiny: TrainConfig, tmp_path: Path) -> None:
    runs = plan(sweep(tiny, tmp_path, curve=[0.5, 1.0]))
    parts = {name: run for name, run in runs.items() if not run.is_whole}
    assert {*parts} == {f"{arm}0.5-seed{n}" for arm in ("best-labels", "plain-labels", "best-images") for n in (1, 2)}
    labels, images = (parts[f"best-{what}0.5-seed1"].job.config.data for what in ("labels", "images"))
    assert (labels.labeled, labels.unlabeled) == (tiny.data.labeled // 2, None)
    assert (images.labeled, images.unlabeled) == (tiny.data.labeled, 0.5)


def checkpoint(run: FinalRun, step: int, value: float) -> None:
    folder = run.job.folder / f"checkpoint_{step}"
    folder.mkdir(parents=True)
    (folder / STATE_FILE).write_bytes(b"x")
    (folder / META_FILE).write_text(json.dumps({"step": step, "bytes": 1, "metrics": {"val/miou": value}}))


@pytest.mark.parametrize(("arm", "step"), [("plain", 2), ("with-val", 4)])
def test_the_best_checkpoint_counts_unless_val_was_trained_on(
    tiny: TrainConfig, tmp_path: Path, arm: str, step: int
) -> None:
    config = sweep(tiny, tmp_path)
    (run, *_) = (run for run in plan_final_runs(tmp_path, config, config.train, 0, {}) if run.arm == arm)
    for at, value in ((2, 0.5), (4, 0.4)):
        checkpoint(run, at, value)
    found = counting_checkpoint(run)
    assert found is not None
    assert found[1]["step"] == step
    assert validation(run) == {2: 0.5, 4: 0.4}[step]


def test_of_the_best_trials_the_one_that_is_best_over_seeds_is_elected(tiny: TrainConfig, tmp_path: Path) -> None:
    config = sweep(tiny, tmp_path, top=2)
    study = SweepStudy(config, tmp_path)
    for value in (0.1, 0.4, 0.3):
        found = study.ask()
        assert found is not None
        study.report(found[0], tiny.schedule.steps, value)
        study.tell(found[0], failure=None)
    assert ([trial.number for trial in study.top(2)], study.best().number) == ([1, 2], 1)
    candidates = plan_candidates(tmp_path, config, {trial.number: config.train for trial in study.top(2)})
    assert [run.job.name for run in candidates] == [f"trial-000{n}-seed{s}" for n in (1, 2) for s in (1, 2)]
    assert plan(config, 2)["trial-0002-seed1"].job.folder.name in {run.job.folder.name for run in candidates}, (
        "not again"
    )
    study.elect({1: 0.2, 2: 0.35})
    assert study.best().number == 2
    again = SweepStudy(config, tmp_path)
    assert (again.best().number, again.is_elected) == (2, True)
    other = SweepStudy(sweep(tiny, tmp_path, top=2, seeds=[5]), tmp_path)
    assert (other.best().number, other.is_elected) == (1, False), "elected by other seeds"
    number, _ = again.ask()
    again.report(number, tiny.schedule.steps, 0.39)
    again.tell(number, failure=None)
    assert (again.best().number, again.is_elected) == (1, False), "another trial has completed"


def test_final_settings_hold_for_what_a_baseline_has_found_too(tiny: TrainConfig, tmp_path: Path) -> None:
    runs = plan(sweep(tiny, tmp_path, set={"optim.lr": 0.25}))
    assert {runs[f"{arm}-seed1"].job.config.optim.lr for arm in ("best", "plain")} == {0.25}


def test_seed_0_is_a_seed_like_any_other(tiny: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = sweep(tiny, tmp_path, seeds=[0, 1])
    runs = plan_final_runs(tmp_path, config, config.train, 0, {})
    for run in runs:
        checkpoint(run, tiny.schedule.steps, 0.5)
    asked: list[Any] = []

    def evaluate(asked_for: list[Any], split: str, _: int) -> list[CheckpointScores]:
        asked.extend((config.seed, split) for config, _, _ in asked_for)
        return [CheckpointScores({}, [])] * len(asked_for)

    monkeypatch.setattr(final_phase, "evaluate_checkpoints", evaluate)
    assert [one.run.repeat for one in evaluate_final_runs(runs)] == [0, 1] * 3
    assert asked == [(0, "test"), (1, "test")] * 3
    assert best_arm_config(config, config.train, runs[0]) == runs[0].job.config
