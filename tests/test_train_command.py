"""`python -m cps_ray.train`: the plan of a dry run, and presets by their names."""

import re
import shlex
from pathlib import Path
from typing import NoReturn

import pytest
import segmentation_models_pytorch as smp

from cps_ray import train

SMALL = {
    "data.labeled": "6",
    "data.crop_px": "[32, 48]",
    "data.labeled_batch": "4",
    "data.unlabeled_batch": "4",
    "model.architecture": "deeplabv3plus",
    "model.encoder": "tu-test_efficientnet",
    "model.weights": "none",
    "model.options": "{decoder_channels: 16}",
    "schedule": "{steps: 60, eval_every: 20}",
    "resources": "{workers: 2, cpus_per_worker: 0.5, gpus_per_worker: 0}",
}


def small(**changes: str) -> list[str]:
    settings = {**SMALL, **{name.replace("__", "."): value for name, value in changes.items()}}
    return [word for name, value in settings.items() for word in ("--set", f"{name}={value}")]


@pytest.fixture(autouse=True)
def _without_a_cluster(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import ray

    def refuse(*_: object, **__: object) -> NoReturn:
        raise AssertionError("Ray was started")

    monkeypatch.setattr(ray, "init", refuse)
    monkeypatch.chdir(tmp_path)


def files(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


def plan(capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    return dict(re.split(r"  +", line, maxsplit=1) for line in capsys.readouterr().out.splitlines())


def test_a_dry_run_shows_the_plan_and_leaves_nothing(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.yaml").write_text(f"preset: reference/voc-cutmix\ndata: {{shards: {shards}}}\n")
    before = files(tmp_path) | files(shards)
    assert train.main(["mine.yaml", "--dry-run", *small(cps__ramp="0.1")]) == 0
    assert files(tmp_path) | files(shards) == before
    rows = plan(capsys)
    assert rows["run folder"] == "train-mine"
    assert rows["method"] == "cps, weight 1 after a ramp over 10% of the steps on unlabeled images, mix cutmix"
    assert re.fullmatch(r"deeplabv3plus, tu-test_efficientnet, weights none: \d\.\d M parameters", rows["network a"])
    assert rows["network b"] == rows["network a"]
    assert (
        rows["normalised"]
        == "mean 0.485 0.456 0.406, std 0.229 0.224 0.225 (ImageNet's, for an encoder without weights)"
    )
    assert rows["images"] == "6 labelled, 18 unlabelled, 6 to validate"
    assert rows["steps"] == "60, with 3 evaluations, one every 20"
    # 60 steps of 4 images: 240 views of 6 and of 18 images.
    assert rows["passes"] == "40.0 over the labelled images, 13.3 over the unlabelled images"
    assert rows["batch"] == "4 + 4 crops of 32x48 px (labelled + unlabelled), 2 + 2 per worker"
    assert rows["workers"] == "2, each 0.5 CPUs, 0 GPUs"
    assert "once it runs" in rows["speed"]


def test_the_plan_says_which_fold_is_held_out(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["reference/voc", "--set", f"data.shards={shards}", "--dry-run", *small(data__unlabeled="0.5")]
    assert train.main([*words, "--set", "data.folds={count: 3, held_out: 1}"]) == 0
    assert plan(capsys)["images"] == "4 labelled, 9 unlabelled, 2 to validate (fold 1 of 0 to 2)"
    assert train.main([*words, "--set", "data.folds={count: 7, held_out: 1}"]) == 2
    assert "7 folds need 7 groups of labelled images, but there are 6" in capsys.readouterr().err


def test_a_dry_run_says_what_a_weights_file_fills(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = "tu-test_efficientnet"
    smp.create_model("unet", name, encoder_weights=None).save_pretrained("mine")
    words = small(model__weights_file="mine")
    assert train.main(["reference/voc", "--set", f"data.shards={shards}", "--dry-run", *words]) == 0
    rows = plan(capsys)
    assert rows["network a"].startswith(f"deeplabv3plus, {name}, weights mine: ")
    assert rows["weights"].startswith(f"{name} filled by 80 tensors of mine under encoder.model.; ")
    assert rows["weights"].endswith(" tensors not used: decoder.* (60), segmentation_head.* (2)")


def test_the_size_of_a_network_is_that_of_its_parameters(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from segmentation_models_pytorch import create_model

    model = create_model("unet", "resnet18", encoder_weights=None, classes=7)
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    words = small(model__b="{architecture: unet, encoder: resnet18}", model__backbone_init="independent")
    assert train.main(["reference/voc", "--set", f"data.shards={shards}", "--dry-run", *words]) == 0
    assert plan(capsys)["network b"] == f"unet, resnet18, weights none: {millions:.1f} M parameters"


def test_a_supervised_plan_speaks_of_labelled_images_alone(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = small(method="supervised", compute__accumulate="2")
    assert train.main(["reference/voc", "--set", f"data.shards={shards}", "--dry-run", *words]) == 0
    rows = plan(capsys)
    assert rows["method"] == "supervised"
    assert "network b" not in rows
    assert rows["passes"] == "40.0 over the labelled images"
    assert rows["batch"] == "4 crops of 32x48 px (labelled), 2 per worker in 2 micro-batches"


def test_a_preset_by_its_name(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("here").symlink_to(shards)
    assert train.main(["reference/cityscapes", "--set", "data.shards=here", "--dry-run", *small()]) == 0
    rows = plan(capsys)
    assert rows["run folder"] == "runs/reference-cityscapes"
    assert rows["method"] == "cps, weight 6 on all images, mix none"
    assert not (tmp_path / "runs").exists()


def test_the_plan_says_when_pseudo_labels_begin(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = small(cps__start="0.25", cps__ramp="0.5")
    assert train.main(["reference/cityscapes", "--set", f"data.shards={shards}", "--dry-run", *words]) == 0
    begins = 0.25 * int(plan(capsys)["steps"].split(",")[0])
    assert train.main(["reference/cityscapes", "--set", f"data.shards={shards}", "--dry-run", *words]) == 0
    expected = f"cps, weight 6 from step {begins:.0f} on after a ramp over 50% of the steps on all images, mix none"
    assert plan(capsys)["method"] == expected


def test_the_plan_names_the_version_of_unimatch(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = small(unimatch__version="v2", ema__decay="0.996", model__options="{decoder_channels: 16}")
    assert train.main(["unimatch/voc", "--set", f"data.shards={shards}", "--dry-run", *words]) == 0
    rows = plan(capsys)
    assert rows["method"] == "unimatch v2, weight 1, mix one_box"
    assert "network b" not in rows


def test_data_yet_to_be_drawn_are_not_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = small(data__shards="drawn", data__synthetic="{train: 40, val: 5}")
    assert train.main(["reference/voc", "--dry-run", *words]) == 0
    rows = plan(capsys)
    assert rows["images"] == "40 to train on and 5 to validate, drawn on first use"
    assert "passes" not in rows
    assert not files(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data.labeled": "1_8"}, "no subset named '1_8' here"),
        ({"data.labeled": "600"}, "data.labeled must be at most 24"),
        ({"model.encoder": "tu-test_eficientnet"}, "Did you mean tu-test_efficientnet?"),
        ({"data.labeled_batch": "3"}, "`data.labeled_batch % (resources.workers * compute.accumulate) == 0` must hold"),
        ({"data.shards": "nowhere"}, "python -m cps_ray.prepare voc"),
    ],
)
def test_a_dry_run_finds_what_a_run_would(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, str], message: str
) -> None:
    words = small(**{"data.shards": str(shards), **changes})
    assert train.main(["reference/voc", "--dry-run", *words]) == 2
    output = capsys.readouterr()
    assert message in output.err
    assert output.err.count("\n") == 1
    assert not output.out
    assert not files(tmp_path)


def test_a_dry_run_refuses_a_folder_that_is_taken(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("runs/reference-voc").mkdir(parents=True)
    Path("runs/reference-voc/log.txt").touch()
    assert train.main(["reference/voc", "--set", f"data.shards={shards}", "--dry-run", *small()]) == 2
    assert "already holds a training" in capsys.readouterr().err


def test_a_folder_without_a_training_is_not_resumed(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A sweep's folder, say, whose best/ the training would replace at its end."""
    Path("runs/sweep/best").mkdir(parents=True)
    Path("runs/sweep/data.parquet").touch()
    words = ["reference/voc", "--set", f"data.shards={shards}", "--dry-run", *small(), "--output", "runs/sweep"]
    assert train.main([*words, "--resume"]) == 2
    text = capsys.readouterr().err
    assert "runs/sweep: must hold a training to be continued, with a config.yaml, but holds best." in text
    Path("runs/sweep/best").rmdir()
    assert train.main([*words, "--resume"]) == 0


def test_an_unknown_name_lists_the_presets(capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main(["none.yaml", "--dry-run"]) == 2
    text = capsys.readouterr().err
    assert text.startswith("error: none.yaml: no such file, and there is no preset 'none.yaml'.")
    assert (
        "reference/cityscapes, reference/cityscapes-cutmix, reference/voc, reference/voc-cutmix, unimatch/voc." in text
    )
    assert text.count("\n") == 1


def test_a_command_that_a_message_names_can_be_pasted(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.yaml").write_text(f"preset: reference/voc-cutmix\ndata: {{shards: {shards}}}\n")
    folder = tmp_path / "we ird%2F[v2]?#é 'x'"
    folder.mkdir()
    (folder / "config.yaml").touch()
    assert train.main(["mine.yaml", *small(), "--output", str(folder)]) == 2
    command = capsys.readouterr().err.partition("Continue it: ")[2].partition(". Start again")[0]
    assert shlex.split(command)[3:] == [f"{folder}/config.yaml", "--output", str(folder), "--resume"]
