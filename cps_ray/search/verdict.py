"""The verdict of a sweep in numbers: its best configuration against the baselines. In words: `results.verdict_lines`."""

import statistics
from collections.abc import Sequence
from typing import Any

from cps_ray.config.sweep import BEST_ARM
from cps_ray.search.final_phase import EvaluatedRun
from cps_ray.search.objective import headline_score


def compare(evaluated: list[EvaluatedRun], metric: str) -> dict[str, Any]:
    """Returns mean and standard deviation over seeds per arm and metric; `gain`: best minus each baseline, in mIoU points.

    `headline`: the score that is compared, per arm: the mIoU of the network that the objective, `metric`, is of.
    `vanished`: by seed of the best arm, the classes that its pseudo labels have lost.
    """
    arms: dict[str, list[EvaluatedRun]] = {}
    for one in evaluated:
        arms.setdefault(one.run.arm, []).append(one)
    table: dict[str, Any] = {}
    for arm, members in arms.items():
        # A class that one seed's test split neither shows nor predicts has no score there: compared is what all seeds have.
        names = sorted(set.intersection(*(set(one.scores.metrics) for one in members)))
        table[arm] = {name: spread([one.scores.metrics[name] for one in members]) for name in names}
    headline = {arm: headline_score(metric, row) for arm, row in table.items()}
    means = {arm: row[headline[arm]]["mean"] for arm, row in table.items()}
    gains = {
        arm: 100 * (means[BEST_ARM] - mean) for arm, mean in means.items() if BEST_ARM in means and arm != BEST_ARM
    }
    vanished = {str(one.run.seed): one.vanished for one in arms.get(BEST_ARM, []) if one.vanished}
    return {"arms": table, "headline": headline, "gain": gains, "vanished": vanished}


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Returns mean and standard deviation (n - 1) over seeds; None in place of the deviation of a single value."""
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "sd": deviation, "n": len(values), "values": list(values)}
