"""The verdict of a sweep: its best configuration against the baselines, in numbers and in words."""

import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from cps_ray.config.sweep import BEST_ARM
from cps_ray.engine.inference import ENSEMBLE
from cps_ray.model.writing import MODEL_FOLDER
from cps_ray.search.display import show_params
from cps_ray.search.export import BEST_FILE
from cps_ray.search.final_phase import EvaluatedRun
from cps_ray.search.objective import HEADLINE, headline_score, measured_network
from cps_ray.text import display_path, shell_path


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


def verdict_lines(root: Path, summary: dict[str, Any]) -> list[str]:
    """Returns the end of a sweep in words, from its summary."""
    best = summary["best"]
    lines = [
        f"Best trial {best['trial']}: {summary['objective']} {best['value']:.4f} at step {best['step']}  {show_params(best['params'])}"
    ]
    final = summary.get("final")  # None: `final.retrain: none`, or the sweep has not come so far
    if final:
        lines += _score_lines(final, summary["objective"])
        for seed, classes in final.get("vanished", {}).items():  # a sweep of an earlier version has not recorded them
            lines.append(
                f"Vanished from the pseudo labels (fraction there by that in the masks), seed {seed}: {classes}"
            )
    lines.append(f"Results: {display_path(root)}: {BEST_FILE}, {MODEL_FOLDER}/, trials.csv, summary.json")
    # A network learns from its peers' labels: the licence of any one's weights may bind it.
    lines += [each["sentence"] for each in summary.get("weights", [])]
    lines.append(f"Train the best again: python -m cps_ray.train {shell_path(root / BEST_FILE)}")
    return lines


def _score_lines(final: dict[str, Any], objective: str) -> Iterator[str]:
    """Yields a line per arm with the mIoU that is compared, then one with the objective's own test value, where that is another score."""
    headline = final.get("headline", {})  # summaries of earlier versions compare network a
    for arm, row in final["arms"].items():
        name = headline.get(arm, HEADLINE)
        network = {"a": "", ENSEMBLE: ", all networks together"}.get(of := measured_network(name), f", network {of}")
        gain = "" if arm == BEST_ARM else f"   best is {final['gain'][arm]:+.1f} points"
        yield f"Test mIoU  {arm:<18}{_score(row[name])}{network}{gain}"
    own = objective.replace("val/", "test/", 1)
    for arm, row in final["arms"].items():
        if own in row and own not in headline.values():
            yield f"{own}  {arm:<18}{_score(row[own])}"


def _score(score: dict[str, Any]) -> str:
    """Returns, for example, `61.3 +- 0.4 % over 3 seed(s)`."""
    deviation = "" if score["sd"] is None else f" +- {100 * score['sd']:.1f}"
    return f"{100 * score['mean']:.1f}{deviation} % over {score['n']} seed(s)"
