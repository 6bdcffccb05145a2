import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cps_ray.config.sweep import SweepConfig
from cps_ray.config.train import TrainConfig
from cps_ray.datasets.shards import open_shards
from cps_ray.on_ray.evaluate_runs import CheckpointScores
from cps_ray.results import verdict_lines
from cps_ray.search.final_phase import EvaluatedRun, FinalRun, over_folds
from cps_ray.search.tune_session import TrainingJob
from cps_ray.search.verdict import compare, groups, notes


def sweep(tiny: TrainConfig, root: Path, baseline: dict[str, Any], **final: Any) -> SweepConfig:
    return SweepConfig.model_validate(
        {
            "version": 1,
            "name": "s",
            "output": str(root),
            "train": tiny.dump(),
            "budget": {"trials": 4},
            "early_stopping": {"type": "none"},
            "search_space": {"optim.lr": {"type": "float", "low": 0.001, "high": 0.1}},
            "baselines": {"plain": baseline},
            "final": {"seeds": [1, 2, 3], **final},
        }
    )


def evaluated(config: TrainConfig, arm: str, repeat: int, hits: list[list[int]]) -> EvaluatedRun:
    """Per image, of 100 pixels of each class those that are found."""
    counts = np.array([[each, [100] * len(each), each] for each in hits])
    mean = float(np.mean([hit.sum() / (200 * len(hits) - hit.sum()) for hit in counts[:, 0].T]))
    run = FinalRun(arm, repeat, TrainingJob(f"{arm}-{repeat}", Path(), config))
    confusion = {"a": [[int(counts[:, 0, 0].sum()), 0], [0, int(counts[:, 0, 1].sum())]]}
    ids = tuple(f"{repeat}-{n}" for n in range(len(hits)))
    return EvaluatedRun(run, Path(), 6, 0.5, CheckpointScores({"test/miou": mean}, [], confusion, ids, counts), 6, 30)


IMAGES = [[60, 50], [62, 47], [58, 52], [61, 49], [60, 51]]


def arm(config: TrainConfig, name: str, plus: list[list[int]]) -> list[EvaluatedRun]:
    """Three trainings, which find so many pixels more of each class."""
    return [evaluated(config, name, n + 1, [[a + x, b + y] for a, b in IMAGES]) for n, (x, y) in enumerate(plus)]


@pytest.mark.parametrize(
    ("plus", "method", "words"),
    [
        ([[20, 20], [21, 21], [20, 21]], "supervised", "better by "),
        ([[-20, -20], [-21, -20], [-21, -21]], "supervised", "worse by "),
        ([[3, 3], [-3, -3], [1, 0]], "supervised", "not distinguishable: .*: use plain, it is cheaper"),
        ([[3, 3], [-3, -3], [1, 0]], "mean_teacher", r"not distinguishable: [^:]*; better on \d of 5 images\)$"),
        ([[40, -20], [41, -20], [41, -21]], "supervised", "better by .*; hurt: car -"),
    ],
)
def test_the_verdict_in_words(tiny: TrainConfig, tmp_path: Path, plus: Any, method: str, words: str) -> None:
    config = sweep(tiny, tmp_path, {"method": method})
    other = tiny.model_copy(update={"method": method})
    runs = arm(tiny, "best", plus) + arm(other, "plain", [[0, 0]] * 3)
    final = compare(runs, config, ["road", "car"], tuned=[], chosen=True)
    best = {"trial": 3, "value": 0.5, "step": 6, "params": {}}
    lines = verdict_lines(Path(), {"best": best, "objective": "val/miou", "final": final})
    (line,) = [line for line in lines if line.startswith("Best against plain")]
    assert re.search(rf"\(baseline not tuned\): {words}", line), line
    final = compare(runs, config, ["road", "car"], tuned=["plain"], chosen=True)
    assert "not tuned" not in "".join(verdict_lines(Path(), {"best": best, "objective": "val/miou", "final": final}))


@pytest.mark.parametrize(("searched", "nested"), [(True, False), (True, True), (False, False)])
def test_the_fold_by_which_a_search_has_chosen_does_not_count(
    tiny: TrainConfig, tmp_path: Path, searched: bool, nested: bool
) -> None:
    chosen = searched and not nested
    config = sweep(tiny, tmp_path, {"method": "supervised"}, folds=3, nested=nested)
    runs = arm(tiny, "best", [[30, 30], [10, 10], [10, 10]]) + arm(tiny, "plain", [[0, 0]] * 3)
    final = compare(runs, config, ["road", "car"], tuned=[], chosen=searched)
    assert final["difference"]["plain"]["trainings"] == (2 if chosen else 3)
    assert final["difference"]["plain"]["images"] == (10 if chosen else 15)
    assert ("plain" in final["apart"]) == chosen
    gain = final["arms"]["best"]["test/miou"]["mean"] - final["arms"]["plain"]["test/miou"]["mean"]
    if chosen:
        assert final["apart"]["plain"] > final["gain"]["plain"] > 0
    # The score of an arm is that of all held-out images, as the difference is. (No wrong pixels in this confusion: only a is checked.)
    assert final["repeat"] == "fold"
    assert isinstance(gain, float)


def test_folds_may_differ_in_the_number_of_networks(tiny: TrainConfig) -> None:
    two, one = arm(tiny, "best", [[0, 0]] * 3)[:2]
    matrix = two.scores.confusion["a"]
    two.scores.confusion.update(b=matrix, ensemble=matrix)
    assert {*over_folds([two, one]).confusion} == {*over_folds([one, two]).confusion} == {"a"}


def test_images_of_a_group_count_once(tiny: TrainConfig, tmp_path: Path) -> None:
    assert groups(None, ["a1", "a2"]) is None
    assert groups("^([ab])", ["a1", "b1", "a2", "c"]) == ["a1", "b1", "a1", "c"]
    config = sweep(tiny, tmp_path, {"method": "supervised"}, group_by=r"-(\d)$")
    runs = arm(tiny, "best", [[5, 5]] * 3) + arm(tiny, "plain", [[0, 0]] * 3)
    assert compare(runs, config, ["road", "car"], tuned=[], chosen=True)["difference"]["plain"]["groups"] == 5


def test_what_else_is_said(tiny: TrainConfig, tmp_path: Path) -> None:
    shards = open_shards(tiny.data.shards)
    val = int(shards.index("val").labeled.sum())
    runs = arm(tiny, "best", [[0, 0]] * 3)
    found = notes(runs, sweep(tiny, tmp_path, {"method": "supervised"}), shards)
    assert [line.startswith(f"val has {val} masks, more than the 6 labelled images") for line in found] == [val > 6] * (
        val > 6
    )
    on_val = sweep(tiny, tmp_path, {"method": "supervised", "train_on": "labeled+val"})
    assert [line.split(",")[0] for line in notes(runs, on_val, shards)] == ["plain was trained on the masks of val"]


def test_a_group_that_one_fold_alone_lacks_is_no_error(tiny: TrainConfig, tmp_path: Path) -> None:
    """The pattern matches the ids of fold 2 and 3 only."""
    config = sweep(tiny, tmp_path, {"method": "supervised"}, folds=3, group_by="^[23]")
    runs = arm(tiny, "best", [[5, 5]] * 3) + arm(tiny, "plain", [[0, 0]] * 3)
    assert compare(runs, config, ["road", "car"], tuned=[], chosen=True)["apart"]["plain"] > 0
