"""What a user takes home: best.yaml, which trains as it is, and best/ with the model."""

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from safetensors.torch import save_file

from cps_ray.config.plugins import is_import_path
from cps_ray.config.train import ENSEMBLE, NETWORK_NAMES, NetworkConfig, TrainConfig
from cps_ray.config.yaml_reader import dump_yaml
from cps_ray.datasets.shards import Manifest
from cps_ray.datasets.show.picture import paint_mask
from cps_ray.engine.batch import IGNORE
from cps_ray.engine.dense import STRIDE
from cps_ray.engine.encoders import weights_of
from cps_ray.engine.networks import Segmenter, create_model_options
from cps_ray.engine.state import load_networks
from cps_ray.files import write_json, write_text
from cps_ray.on_ray.evaluate_runs import CheckpointScores
from cps_ray.results import BEST_FILE, MODEL_FOLDER
from cps_ray.runs import read_checkpoint


def write_best(root: Path, config: TrainConfig, header: str) -> Path:
    """Writes best.yaml, the whole config; its paths hold from the sweep folder."""
    path = root / BEST_FILE
    write_text(path, dump_yaml(config.dump(str(root)), header))
    return path


def export_model(
    root: Path, config: TrainConfig, checkpoint: Path, manifest: Manifest, metrics: dict[str, Any], network: str = "a"
) -> Path:
    """Writes best/: a network as safetensors, what is needed to build and use it, its config and its scores.

    `network`: its name, or ENSEMBLE for all of them, a as model.safetensors and the others as model-b.safetensors, ...
    """
    folder = root / MODEL_FOLDER
    # Written beside it, so that a kill leaves the model of before.
    unfinished = root / f".{MODEL_FOLDER}.tmp"
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    networks = load_networks(config, read_checkpoint(checkpoint), len(manifest.classes), source=checkpoint)
    first, *peers = networks if network == ENSEMBLE else [network]
    described = {}
    for name in (first, *peers):
        # safetensors stores memory as it lies and would refuse channels_last.
        # Of the inner network, so that smp loads the file by itself; normalisation is described in model.json.
        weights = {key: value.contiguous() for key, value in networks[name].network.state_dict().items()}
        save_file(weights, unfinished / _weights_file(name, first))
        form = config.model.of(NETWORK_NAMES.index(name))
        described[name] = _describe(form, networks[name], len(manifest.classes))
    together: dict[str, Any] = {
        "combine": "mean of all networks' probabilities, each the softmax of its logits over the classes",
        "peers": [{"network": name, "file": _weights_file(name, first), **described[name]} for name in peers],
    }
    describe = {
        "library": "segmentation-models-pytorch",
        "network": network,
        **described[first],
        **(together if peers else {}),
        "classes": list(manifest.classes),
        "palette": [list(color) for color in manifest.palette],
        "ignore": IGNORE,
        "fingerprint": config.data.fingerprint,
        # What pixels were before they became 8-bit RGB; a predictor of raw files does the same.
        **manifest.model_dump(mode="json", include={"bands", "value_range"}),
    }
    (unfinished / "model.json").write_text(json.dumps(describe, indent=2) + "\n")
    (unfinished / "config.yaml").write_text(dump_yaml(config.dump(str(folder)), "The training that made this model."))
    write_json(unfinished / "metrics.json", metrics)
    # A folder cannot replace a full one at once; between these two lines there is none, but never half of one.
    shutil.rmtree(folder, ignore_errors=True)
    unfinished.rename(folder)
    return folder


def _weights_file(name: str, first: str) -> str:
    return "model.safetensors" if name == first else f"model-{name}.safetensors"


def _describe(form: NetworkConfig, network: Segmenter, num_classes: int) -> dict[str, Any]:
    """Returns how smp builds a network, what it takes, and what it began with."""
    divisor = STRIDE if STRIDE % network.divisor == 0 else network.divisor
    plugged_in = [name for name in (form.architecture, form.encoder) if is_import_path(name)]
    return {
        # With a colon, MODULE:NAME must be at hand to build it.
        **({"plugins": plugged_in} if plugged_in else {}),
        "create_model": {
            "arch": form.architecture,
            "encoder_name": form.encoder,
            "encoder_weights": None,  # all weights are in the file: whoever builds it must not fetch any
            "classes": num_classes,
            **create_model_options(form),
        },
        # Patches of 14 px and the like: smp's own DPT cannot run them as it builds them.
        **({} if divisor == STRIDE else {"then": "cps_ray.engine.vit.fit_patches(network)"}),
        "weights": weights_of(form).record(),  # their licence may bind the model
        "input": {
            "layout": f"RGB, float32, (image / 255 - mean) / std, sides padded to a multiple of {divisor}",
            "mean": (network.mean.flatten() / 255).tolist(),
            "std": (network.std.flatten() / 255).tolist(),
        },
    }


def write_seeds(path: Path, rows: list[dict[str, Any]]) -> None:
    """Writes seeds.csv, one line per final run."""
    with path.open("w", newline="") as file:
        # Arms may measure different things (a pair has b/miou): columns are those of all, in the order of their first row.
        writer = csv.DictWriter(file, fieldnames=list(dict.fromkeys(name for row in rows for name in row)))
        writer.writeheader()
        writer.writerows(rows)


def write_picture(path: Path, scores: dict[str, CheckpointScores], manifest: Manifest, height_px: int = 192) -> None:
    """Writes a sheet with a row per example image: the image, the truth and each model's prediction."""
    first = next(iter(scores.values()))
    titles = ["image", "truth", *scores]
    rows = []
    for number, (_, image, truth, _) in enumerate(first.examples):
        predictions = [each.examples[number][3] for each in scores.values()]
        # Pixels that count nowhere are hatched in the truth, and in the predictions so that eyes compare like with like.
        masks = [np.where(truth == IGNORE, IGNORE, mask).astype(np.uint8) for mask in (truth, *predictions)]
        tiles = [
            _tile(picture, height_px) for picture in (image, *(paint_mask(mask, manifest.palette) for mask in masks))
        ]
        rows.append(np.hstack(tiles))
    width = max(row.shape[1] for row in rows)
    white = (255, 255, 255)
    rows = [cv2.copyMakeBorder(r, 0, 0, 0, width - r.shape[1], cv2.BORDER_CONSTANT, value=white) for r in rows]
    sheet = np.vstack([_heading(titles, rows[0].shape[1]), *rows])
    cv2.imwrite(str(path), cv2.cvtColor(sheet, cv2.COLOR_RGB2BGR))  # OpenCV writes BGR


def _tile(picture: NDArray[np.uint8], height_px: int) -> NDArray[np.uint8]:
    height, width = picture.shape[:2]
    size = (round(width * height_px / height), height_px)
    # Nearest: masks are painted already, and colours between two classes would be those of a third.
    scaled = cv2.resize(picture, size, interpolation=cv2.INTER_NEAREST)
    return np.asarray(
        cv2.copyMakeBorder(scaled, 3, 3, 3, 3, cv2.BORDER_CONSTANT, value=(255, 255, 255)), dtype=np.uint8
    )


def _heading(titles: list[str], width: int) -> NDArray[np.uint8]:
    band = np.full((34, width, 3), 255, dtype=np.uint8)
    column = width // len(titles)
    for number, title in enumerate(titles):
        cv2.putText(
            band, title, (number * column + 8, 23), cv2.FONT_HERSHEY_SIMPLEX, 0.55, (30, 30, 30), 1, cv2.LINE_AA
        )
    return band
