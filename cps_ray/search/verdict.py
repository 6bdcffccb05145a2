"""The verdict of a sweep in numbers: its best configuration against the baselines. In words: `results.verdict_lines`."""

import statistics
from collections.abc import Collection, Sequence
from dataclasses import asdict
from typing import Any

from cps_ray.config.sweep import BEST_ARM, SweepConfig
from cps_ray.datasets.shards import Shards
from cps_ray.datasets.stratified import group_images
from cps_ray.model.intervals import difference
from cps_ray.search.curve import learning_curve
from cps_ray.search.final_phase import EvaluatedRun, over_folds
from cps_ray.search.objective import headline_score


def compare(
    evaluated: list[EvaluatedRun], config: SweepConfig, classes: Sequence[str], *, tuned: Collection[str], chosen: bool
) -> dict[str, Any]:
    """Returns what the final runs show:

    `arms`: mean and standard deviation over seeds, draws or folds, per arm and metric; `repeat`: which of the three. With folds, the score that is
    compared has as its mean that of all held-out images together.
    `headline`: the score that is compared, per arm: the mIoU of the network that the objective is of.
    `gain`: best minus each baseline, in mIoU points; `difference`: the same with its interval, and per class, as `intervals.Difference`, with
    `tuned`: whether the baseline had a search of its own.
    `apart`: with folds, the gains on the first one, by which a search has chosen (`chosen`), and which hence does not count in the rest.
    `vanished`: by seed of the best arm, the classes that its pseudo labels have lost. `curve`: see `learning_curve`.
    """
    counted = [one for one in evaluated if one.run.is_whole]
    is_apart = chosen and config.final.folds is not None and not config.final.nested
    first, arms = _by_arm(one for one in counted if is_apart and one.run.repeat == 1), _by_arm(counted)
    kept = _by_arm(one for one in counted if not (is_apart and one.run.repeat == 1))
    # A class that one seed's test split neither shows nor predicts has no score there: compared is what all seeds have.
    table = {arm: _spreads(members) for arm, members in kept.items()}
    headline = {arm: headline_score(config.objective.metric, row) for arm, row in table.items()}
    if config.final.folds:
        # Of all held-out images together, as their difference is: a fold alone may lack classes.
        for arm, members in kept.items():
            table[arm][headline[arm]]["mean"] = over_folds(members).metrics[headline[arm]]
    differences = {
        arm: _difference(kept, arm, config, classes) | {"tuned": arm in tuned, "advice": _advice(kept, arm)}
        for arm in kept
        if BEST_ARM in kept and arm != BEST_ARM
    }
    return {
        "arms": table,
        "headline": headline,
        "repeat": config.final.repeat_name,
        "gain": {arm: 100 * each["gain"] for arm, each in differences.items()},
        "difference": differences,
        "apart": {arm: 100 * _difference(first, arm, config, classes)["gain"] for arm in first if arm != BEST_ARM},
        "vanished": {str(one.run.repeat): one.vanished for one in arms.get(BEST_ARM, []) if one.vanished},
        "curve": learning_curve(evaluated, config) if config.final.curve else None,
    }


def notes(evaluated: Sequence[EvaluatedRun], config: SweepConfig, shards: Shards) -> list[str]:
    """Returns what else one must know of the comparison."""
    on_val = [name for name in config.baselines if config.baseline(name).train_on == "labeled+val"]
    found = [
        f"{name} was trained on the masks of val, too, which nothing was then chosen by: its last step counts."
        for name in on_val
    ]
    val = 0 if config.final.folds or "val" not in shards.manifest.splits else int(shards.index("val").labeled.sum())
    labeled = max((one.num_labeled for one in evaluated if one.run.arm == BEST_ARM), default=0)
    if val > labeled and not on_val:
        found.append(
            f"val has {val} masks, more than the {labeled} labelled images: what training on them, too, would bring, a baseline with "
            "`train_on: labeled+val` shows."
        )
    return found


def _advice(arms: dict[str, list[EvaluatedRun]], arm: str) -> str:
    """Returns what follows where two arms cannot be told apart."""
    is_cheaper = not arms[arm][0].run.job.config.semi_supervised
    return f"use {arm}, it is cheaper" if is_cheaper else ""


def _by_arm(runs: Any) -> dict[str, list[EvaluatedRun]]:
    arms: dict[str, list[EvaluatedRun]] = {}
    for one in runs:
        arms.setdefault(one.run.arm, []).append(one)
    return arms


def _difference(
    arms: dict[str, list[EvaluatedRun]], arm: str, config: SweepConfig, classes: Sequence[str]
) -> dict[str, Any]:
    best, other = arms[BEST_ARM], arms[arm]
    # Folds are left out whole, and their groups with them.
    pattern = None if config.final.folds else config.final.group_by
    found = difference(
        [one.scores.counts for one in best],
        [one.scores.counts for one in other],
        classes,
        groups(pattern, best[0].scores.ids),
        folds=config.final.folds is not None,
    )
    return asdict(found)


def groups(pattern: str | None, ids: Sequence[str]) -> list[str] | None:
    """Returns the group of each image, as `final.group_by` says; an image that it does not match is a group of its own. Raises DataError if it matches
    none."""
    if pattern is None:
        return None
    found = group_images({image_id: image_id for image_id in ids}, pattern, [])
    return [found[image_id] for image_id in ids]


def _spreads(members: list[EvaluatedRun]) -> dict[str, Any]:
    names = sorted(set.intersection(*(set(one.scores.metrics) for one in members)))
    return {name: spread([one.scores.metrics[name] for one in members]) for name in names}


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Returns mean and standard deviation (n - 1) over seeds; None in place of the deviation of a single value."""
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "sd": deviation, "n": len(values), "values": list(values)}
