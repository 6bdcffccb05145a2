"""The model of a training, made from its best checkpoint."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cps_ray.config.train import TrainConfig
from cps_ray.datasets.shards import Shards
from cps_ray.engine.state import load_networks
from cps_ray.files import replaced_folder
from cps_ray.model.card import Arms
from cps_ray.model.description import MODEL_FOLDER
from cps_ray.model.examples import write_examples
from cps_ray.model.writing import write_model
from cps_ray.on_ray.evaluate_runs import CheckpointScores, evaluate_checkpoints
from cps_ray.runs import META_FILE, best_checkpoint, read_checkpoint

_EXAMPLES = 5


def export_best(
    root: Path, config: TrainConfig, run_dir: Path, metric: str, network: str, shards: Shards
) -> Path | None:
    """Writes best/ in `root` from the checkpoint of a run that is best by `metric`, with its scores on val. Returns best/; None if there is no
    checkpoint. On the connected cluster. `network`: the one that `metric` is of."""
    found = best_checkpoint(run_dir, metric)
    if found is None:
        return None
    checkpoint, meta = found
    (scores,) = evaluate_checkpoints([(config, checkpoint, network)], "val", _EXAMPLES)
    facts = {"step": meta["step"], "seed": config.seed}
    with replaced_folder(root / MODEL_FOLDER) as folder:
        write_checkpoint_model(folder, config, checkpoint, shards, scores, facts, network=network)
        write_examples(folder / "examples.png", {config.method: scores.examples}, shards.manifest.palette)
    return root / MODEL_FOLDER


def write_checkpoint_model(
    folder: Path,
    config: TrainConfig,
    checkpoint: Path,
    shards: Shards,
    scores: CheckpointScores,
    facts: Mapping[str, Any],
    *,
    network: str,
    arms: Arms | None = None,
) -> None:
    """Writes a checkpoint's model into an empty folder. Its metrics are `facts`, what the training measured then, and `scores`. For the
    rest see `write_model`."""
    measured = json.loads((checkpoint / META_FILE).read_text())["metrics"]
    networks = load_networks(config, read_checkpoint(checkpoint), len(shards.classes), source=checkpoint)
    metrics = {**facts, **measured, **scores.metrics, "confusion": scores.confusion}
    write_model(folder, config, networks, shards.manifest, metrics, network=network, arms=arms)
