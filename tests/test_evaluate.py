"""`cps-ray evaluate` from its arguments to its files."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support import changed, write_untrained

from cps_ray import evaluate, predict
from cps_ray.config.train import SyntheticConfig, TrainConfig
from cps_ray.datasets.open import fingerprints
from cps_ray.datasets.shards import open_shards
from cps_ray.datasets.synthetic import write_synthetic


def test_a_split(best: Path, shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate.main([str(best), str(shards), "--against", str(best), "--against-network", "b"]) == 0
    out = best.with_name("best-test")
    assert {path.name for path in out.iterdir()} == {"scores.json", "images.csv", "confusion.png", "worst.png"}
    scores = json.loads((out / "scores.json").read_text())
    printed = capsys.readouterr().out
    assert f"mIoU {100 * scores['miou']:.1f} %" in printed
    assert "(a) against" in printed
    assert scores["against"]["network"] == "b"
    assert scores["against"]["difference"]["images"] == scores["images"] == 6
    assert len((out / "images.csv").read_text().splitlines()) == 7
    assert Image.open(out / "worst.png").height > 6 * 192
    assert "trained on" not in printed


@pytest.mark.parametrize(("split", "words"), [("train", "was trained on these very images"), ("val", "chosen by")])
def test_known_images_are_said_to_be_known(
    best: Path, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], split: str, words: str
) -> None:
    assert (
        evaluate.main([str(best), str(shards), "--split", split, "--output", str(tmp_path / "o"), "--worst", "0"]) == 0
    )
    assert words in capsys.readouterr().out
    assert not (tmp_path / "o/worst.png").exists()


def test_further_labelled_splits_are_known_too(
    tiny: TrainConfig, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    known = fingerprints(open_shards(shards))
    model = write_untrained(changed(tiny, data__fingerprint=known, data__further_labeled=["test"]), tmp_path / "best")
    assert evaluate.main([str(model), str(shards), "--output", str(tmp_path / "o"), "--worst", "0"]) == 0
    assert "was trained on these very images" in capsys.readouterr().out
    assert "The masks of test were used to train, too." in (model / "README.md").read_text()


def test_frames_are_drawn_together(best: Path, shards: Path, tmp_path: Path) -> None:
    words = [str(best), str(shards), "--against", str(best), "--output", str(tmp_path / "o"), "--group-by"]
    assert evaluate.main([*words, r"_0000([0-4])|_(0000)5"]) == 0
    assert json.loads((tmp_path / "o/scores.json").read_text())["against"]["difference"]["groups"] == 6
    for whole in (r"^test", r"^(test)_\d+"):  # all that it matches, or its first group
        assert evaluate.main([*words, whole]) == 0
        assert json.loads((tmp_path / "o/scores.json").read_text())["against"]["difference"]["groups"] == 1
    assert json.loads((tmp_path / "o/scores.json").read_text())["against"]["difference"]["low"] is None


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ([], "either SHARDS, or both --images and --masks must be given"),
        (["--images", "x"], "either SHARDS, or both --images and --masks must be given"),
        (["SHARDS", "--images", "x", "--masks", "y"], "either SHARDS, or both --images and --masks must be given"),
        (["SHARDS", "--split", "no"], "no"),
        (["SHARDS", "--network", "c"], "network must be one of a, b, ensemble, but got 'c'"),
        (["SHARDS", "--against-network", "a"], "--against-network needs --against MODEL"),
        (["SHARDS", "--group-by", "test"], "--group-by needs --against MODEL"),
        (["SHARDS", "--output", "SHARDS/manifest.json/o"], "manifest.json/o: cannot be made (Not a directory)"),
        (
            ["SHARDS", "--against", "BEST", "--group-by", "zzz"],
            "must match ids, but matches none; they look like 'test_",
        ),
        (["--images", "no/where", "--masks", "no/where"], "no/where: must be a folder, a pattern, an image or a list"),
        (["OTHER"], "must have the model's classes in its order"),
    ],
)
def test_what_does_not_go_is_one_line(
    best: Path,
    shards: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    words: list[str],
    text: str,
) -> None:
    other = tmp_path / "other"
    write_synthetic(other, SyntheticConfig(train=4, val=1, test=1, height_px=32, width_px=32))
    manifest = json.loads((other / "manifest.json").read_text())
    manifest |= {"classes": [*"abcdefg"], "sha256": ""}
    (other / "manifest.json").write_text(json.dumps(manifest))
    given = {"BEST": str(best), "OTHER": str(other)}
    monkeypatch.setattr("cps_ray.model.evaluating.evaluate_model", None)  # nothing is predicted before it is refused
    words = [
        word.replace("SHARDS", str(shards)) if word.startswith("SHARDS") else given.get(word, word) for word in words
    ]
    assert evaluate.main([str(best), *words]) == 2
    err = capsys.readouterr().err
    assert text in err
    assert err.count("\n") == 1


def test_predictions_evaluated_as_masks_are_all_right(
    best: Path, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Both commands make the same labels; and what `predict` writes are masks that `evaluate` reads."""
    index = open_shards(shards).index("test")
    (tmp_path / "photos/drive").mkdir(parents=True)
    for encoded in index.locations.read(range(len(index)), masks=False):
        (tmp_path / f"photos/drive/{encoded.id}.png").write_bytes(encoded.image)
    photos, predicted = str(tmp_path / "photos"), str(tmp_path / "predicted")
    assert predict.main([str(best), photos, predicted, "--network", "b"]) == 0
    words = ["--images", photos, "--masks", f"{predicted}/labels", "--network", "b", "--output", str(tmp_path / "o")]
    (tmp_path / "photos/more.png").write_bytes(encoded.image)
    assert evaluate.main([str(best), *words]) == 0
    assert "1 of 7 images have no mask and were left out." in capsys.readouterr().out
    scores = json.loads((tmp_path / "o/scores.json").read_text())
    assert (scores["miou"], scores["pixel_accuracy"], scores["images"]) == (1.0, 1.0, 6)
    assert "drive/test_00000" in (tmp_path / "o/images.csv").read_text()
    label = Path(predicted, "labels/drive/test_00000.png")
    Image.fromarray(np.full_like(np.asarray(Image.open(label)), 255)).save(label)
    words[3] = f"{predicted}/labels/drive/*.png"
    words[1] = f"{photos}/drive/*.png"
    assert evaluate.main([str(best), *words[:-2], "--worst", "0"]) == 0
    rows = (best.with_name("best-drive") / "images.csv").read_text().splitlines()
    assert [row for row in rows if row.endswith(",,")], "what has no pixel that counts has no accuracy"
