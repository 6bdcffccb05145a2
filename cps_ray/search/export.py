"""What a sweep leaves for its user beside the model: best.yaml, which trains as it is, and the scores of all final runs."""

import csv
from pathlib import Path
from typing import Any

from cps_ray.config.train import TrainConfig
from cps_ray.config.yaml_reader import dump_yaml
from cps_ray.files import write_text
from cps_ray.results import BEST_FILE


def write_best(root: Path, config: TrainConfig, header: str) -> Path:
    """Writes best.yaml, the whole config; its paths hold from the sweep folder."""
    path = root / BEST_FILE
    write_text(path, dump_yaml(config.dump(str(root)), header))
    return path


def write_seeds(path: Path, rows: list[dict[str, Any]]) -> None:
    """Writes seeds.csv, one line per final run."""
    with path.open("w", newline="") as file:
        # Arms may measure different things (a pair has b/miou): columns are those of all, in the order of their first row.
        writer = csv.DictWriter(file, fieldnames=list(dict.fromkeys(name for row in rows for name in row)))
        writer.writeheader()
        writer.writerows(rows)
