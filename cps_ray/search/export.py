"""What a sweep leaves for its user: best.yaml, which trains as it is, the model, and the scores of all final runs."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cps_ray.config.reader import load_train
from cps_ray.config.sweep import BEST_ARM, SweepConfig, measured_network
from cps_ray.config.train import TrainConfig
from cps_ray.config.yaml_reader import dump_yaml
from cps_ray.datasets.shards import Shards
from cps_ray.errors import CpsRayError
from cps_ray.files import replaced_folder, write_text
from cps_ray.model.curve import curve_picture
from cps_ray.model.description import MODEL_FOLDER
from cps_ray.model.examples import write_examples
from cps_ray.on_ray.export import write_checkpoint_model
from cps_ray.results import BEST_FILE
from cps_ray.search.final_phase import EvaluatedRun, FinalRun, best_arm_config, counting_checkpoint, over_folds


def write_best(root: Path, config: TrainConfig, header: str) -> Path:
    """Writes best.yaml, the whole config; its paths hold from the sweep folder."""
    path = root / BEST_FILE
    write_text(path, dump_yaml(config.dump(str(root)), header))
    return path


def export_final(
    root: Path,
    config: SweepConfig,
    runs: Sequence[FinalRun],
    evaluated: Sequence[EvaluatedRun],
    final: Mapping[str, Any],
    shards: Shards,
) -> TrainConfig:
    """Writes best/ from the final runs and what they show (`final`, of `verdict.compare`); returns the training that it is from. Raises CpsRayError if that is not what best.yaml says."""
    of_best = [one for one in evaluated if one.run.arm == BEST_ARM and one.run.is_whole]
    # Of the seeds the one that is best on val: choosing by test would make its test score too good.
    top = max(of_best, key=lambda one: one.validation)
    delivered, checkpoint, step, scores = top.run, top.checkpoint, top.step, top.scores
    if config.final.folds:
        (delivered,) = (run for run in runs if run.split is None)
        found = counting_checkpoint(delivered)
        assert found is not None  # each has ended well
        checkpoint, step, scores = found[0], found[1]["step"], over_folds(of_best)
    job = delivered.job
    wanted = best_arm_config(config, load_train(root / BEST_FILE), delivered)
    if wanted != job.config:
        raise CpsRayError(
            f"{job.folder}: must be a training of {BEST_FILE}, but has other settings. Remove it, and resume."
        )
    columns = {
        one.run.arm: one.scores.examples for one in evaluated if one.run.repeat == top.run.repeat and one.run.is_whole
    }
    # Last, so that it stands beside what it is compared with. The space: no baseline can have this name.
    columns[f"{BEST_ARM} {job.config.method}"] = columns.pop(BEST_ARM)
    facts = {"step": step, "seed": job.config.seed}
    with replaced_folder(root / MODEL_FOLDER) as folder:
        network = measured_network(job.metric)
        write_checkpoint_model(
            folder, job.config, checkpoint, shards, scores, facts, network=network, arms=final["arms"]
        )
        _write_seeds(folder / "seeds.csv", [_row(one, config) for one in evaluated])
        write_examples(folder / "examples.png", columns, shards.manifest.palette)
        if final["curve"]:
            curve_picture(final["curve"]).save(folder / "curve.png")
    return job.config


def _row(one: EvaluatedRun, config: SweepConfig) -> dict[str, Any]:
    """Returns a line of seeds.csv."""
    part = {"labels": one.num_labeled, "unlabeled": one.num_unlabeled} if config.final.curve else {}
    return {"arm": one.run.arm, config.final.repeat_name: one.run.repeat, **part, **one.row()}


def _write_seeds(path: Path, rows: list[dict[str, Any]]) -> None:
    """Writes seeds.csv, one line per final run."""
    with path.open("w", newline="") as file:
        # Arms may measure different things (a pair has b/miou): columns are those of all, in the order of their first row.
        writer = csv.DictWriter(file, fieldnames=list(dict.fromkeys(name for row in rows for name in row)))
        writer.writeheader()
        writer.writerows(rows)
