"""Every shipped preset as people use it: official folders, `prepare`, imported lists, dry run, 50 steps.

Only sizes (image, crop, window, batch), length and hardware are reduced; weights are random, because no test may download.
"""

import json
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pytest
import trees

pytestmark = [pytest.mark.slow, pytest.mark.ray]

SIZE = (96, 128)
LABELED = 4
REDUCED = {
    "data.crop_px": "[64, 96]",
    "data.labeled_batch": "2",
    "data.unlabeled_batch": "2",
    "model.weights": "none",
    "schedule": "{steps: 50, eval_every: 25}",
    "evaluation": "{window_px: [64, 64], stride_px: [42, 42]}",
    "resources": "{workers: 1, cpus_per_worker: 1, gpus_per_worker: 0}",
}


def run(cwd: Path, *words: str) -> str:
    """Returns the output of `python -m cps_ray.WORDS`, which must succeed."""
    env = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    command = [sys.executable, "-m", f"cps_ray.{words[0]}", *words[1:]]
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, f"{' '.join(words)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def lists(folder: Path, train: list[str]) -> None:
    """Writes published lists, as the authors name them: the first few images are labelled."""
    folder.mkdir(parents=True)
    for kind, names in (("labeled", train[:LABELED]), ("unlabeled", train[LABELED:])):
        (folder / f"train_aug_{kind}_1-8.txt").write_text("".join(f"{name}\n" for name in names))


def voc(cwd: Path) -> None:
    trees.voc(cwd / "data/voc/raw")
    trees.sbd(cwd / "data/voc/sbd")
    run(cwd, "prepare", "voc", "data/voc/raw", "data/voc/shards", "--sbd", "data/voc/sbd", "--published")
    val = {*trees.VOC_VAL}
    lists(cwd / "lists", sorted({*trees.VOC_TRAIN, *trees.SBD_TRAIN, *trees.SBD_VAL} - val))


def cityscapes(cwd: Path) -> None:
    trees.cityscapes(cwd / "data/cityscapes/raw", train_extra=0)
    run(cwd, "prepare", "cityscapes", "data/cityscapes/raw", "data/cityscapes/shards", "--published")
    frames = [(city, frame) for city, count in trees.CITIES["train"].items() for frame in range(count)]
    path = "leftImg8bit/train/{0}/{1}_leftImg8bit.png\tgtFine/train/{0}/{1}_gtFine_labelTrainIds.png"
    lists(cwd / "lists", [path.format(city, trees.city_id(city, frame)) for city, frame in frames])


@pytest.fixture(params=[voc, cityscapes], ids=["voc", "cityscapes"], scope="module")
def prepared(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """(name of the data set, working directory): data/NAME/shards, with the labelled subset 1_8."""
    name = request.param.__name__
    cwd = tmp_path_factory.mktemp(name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trees, "SIZE", SIZE)
        patch.setattr(trees, "scene", partial(trees.scene, size=SIZE))
        patch.setattr(trees, "patches", partial(trees.patches, size=SIZE))
        request.param(cwd)
    run(cwd, "subsets", "import", "lists", f"data/{name}/shards")
    return name, cwd


@pytest.mark.parametrize("variant", ["", "-cutmix"], ids=["plain", "cutmix"])
def test_a_preset_trains(prepared: tuple[str, Path], variant: str) -> None:
    dataset, cwd = prepared
    trains(cwd, f"reference/{dataset}{variant}", {"data.shards": f"data/{dataset}/shards", **REDUCED})


@pytest.mark.parametrize("name", ["dinov2-small", "dinov2-small-convnext", "dinov3-small"])
def test_a_modern_preset_trains(tmp_path: Path, name: str) -> None:
    embedded = {"data.shards": "shards", "data.synthetic": "{train: 24, val: 6, test: 6}", "data.labeled": str(LABELED)}
    b = {"model.b.weights": "none"} if name.endswith("convnext") else {}
    # bf16 is slow on most CPUs, and a step of two transformers takes seconds there.
    few = {"compute.autocast": "none", "schedule": "{steps: 4, eval_every: 2}"}
    trains(tmp_path, f"modern/{name}", {**embedded, **REDUCED, **few, **b}, evaluated_at=[2, 4])


def trains(cwd: Path, name: str, changes: dict[str, str], evaluated_at: Sequence[int] = (25, 50)) -> None:
    """Runs a preset with these changes, first dry."""
    words = [name, *(word for change in changes.items() for word in ("--set", "=".join(change)))]

    plan = run(cwd, "train", *words, "--dry-run")
    assert f"images      {LABELED} labelled" in plan or "drawn on first use" in plan
    folder = cwd / "runs" / name.replace("/", "-")
    assert not folder.exists()

    print(plan, run(cwd, "train", *words), sep="\n")
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [*evaluated_at]
    for record in records:
        losses = {key: value for key, value in record.items() if key.startswith("train/")}
        assert "train/loss" in losses
        assert all(math.isfinite(value) for value in losses.values()), losses
        assert 0.0 <= record["val/miou"] <= 1.0
    assert any(value > 0.0 for key, value in records[-1].items() if "cps" in key), records[-1]
