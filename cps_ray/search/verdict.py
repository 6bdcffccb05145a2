"""The verdict of a sweep: its best configuration against the baselines, in numbers and in words."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cps_ray.search.display import show_params
from cps_ray.search.export import BEST_FILE, MODEL_FOLDER
from cps_ray.search.final_phase import BEST_ARM, EvaluatedRun
from cps_ray.text import display_path


def compare(evaluated: list[EvaluatedRun]) -> dict[str, Any]:
    """Returns mean and standard deviation over seeds per arm and metric; `gain`: best minus each baseline, in mIoU points."""
    arms: dict[str, list[EvaluatedRun]] = {}
    for one in evaluated:
        arms.setdefault(one.run.arm, []).append(one)
    table: dict[str, Any] = {}
    for arm, members in arms.items():
        # A class that one seed's test split neither shows nor predicts has no score there: compared is what all seeds have.
        names = sorted(set.intersection(*(set(one.scores.metrics) for one in members)))
        table[arm] = {name: spread([one.scores.metrics[name] for one in members]) for name in names}
    gains = {}
    if BEST_ARM in table:
        best = table[BEST_ARM]["test/miou"]["mean"]
        gains = {arm: 100 * (best - row["test/miou"]["mean"]) for arm, row in table.items() if arm != BEST_ARM}
    return {"arms": table, "gain": gains}


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
        for arm, row in final["arms"].items():
            score = row["test/miou"]
            deviation = "" if score["sd"] is None else f" +- {100 * score['sd']:.1f}"
            gain = "" if arm == BEST_ARM else f"   best is {final['gain'][arm]:+.1f} points"
            lines.append(f"Test mIoU  {arm:<18}{100 * score['mean']:.1f}{deviation} % over {score['n']} seed(s){gain}")
    lines.append(f"Results: {display_path(root)}: {BEST_FILE}, {MODEL_FOLDER}/, trials.csv, summary.json")
    lines.append(f"Train the best again: python -m cps_ray.train {display_path(root / BEST_FILE)}")
    return lines
