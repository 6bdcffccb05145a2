"""Photos predicted into a folder: the labels of `Model.predict`, files of all kinds, what a run that goes on does, and what is refused."""

import csv
import json
import os
import shutil
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image

from cps_ray.datasets.show.picture import paint_mask
from cps_ray.errors import CpsRayError, DataError
from cps_ray.model.model import Model, load_model
from cps_ray.model.photos import Photo, cut_into_chunks, find_photos
from cps_ray.model.predicting import OutputOptions, cut_work, predict_chunks
from cps_ray.model.prediction_folder import PredictionFolder

RNG = np.random.default_rng(5)


def photo(height: int = 32, width: int = 48) -> np.ndarray:
    return RNG.integers(0, 256, (height, width, 3), np.uint8)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photos of all kinds, sizes and names, and files that are none."""
    folder = tmp_path_factory.mktemp("input") / "photos"
    (folder / "drive a/été").mkdir(parents=True)
    exif = Image.Exif()
    exif[0x0112] = 6
    for number in range(3):
        Image.fromarray(photo()).save(folder / f"drive a/{number}.jpg", quality=95)
    Image.fromarray(photo()).save(folder / "turned.JPG", exif=exif)
    cv2.imwrite(str(folder / "wide.png"), RNG.integers(0, 2**16, (40, 50), np.uint16))
    Image.fromarray(photo()[..., 0]).save(folder / "drive a/été/grey 1.png")
    Image.fromarray(np.dstack([photo(), photo()[..., 0]])).save(folder / "drive a/été/路.png")
    Image.fromarray(photo(50, 40)).save(folder / "b.tif")
    Image.fromarray(photo()).save(folder / "c.webp", lossless=True)
    Image.fromarray(photo(100, 160)).save(folder / "large.png")
    (folder / "notes.txt").write_text("no image")
    Image.fromarray(photo()).save(folder / ".hidden.png")
    return folder


NAMES = [
    "b",
    "c",
    "drive a/0",
    "drive a/1",
    "drive a/2",
    "drive a/été/grey 1",
    "drive a/été/路",
    "large",
    "turned",
    "wide",
]


@pytest.fixture
def bad(photos: Path, tmp_path: Path) -> Path:
    """The photos, and files that look like photos."""
    folder = Path(shutil.copytree(photos, tmp_path / "bad"))
    (folder / "b.tif").write_bytes(b"")
    (folder / "drive a/1.jpg").write_bytes((folder / "drive a/1.jpg").read_bytes()[:300])
    (folder / "film.png").write_bytes(b"\0\0\0\x18ftypmp42" + bytes(100))
    return folder


@pytest.fixture(scope="module")
def model(exported: Path) -> Model:
    return load_model(exported, device="cpu")


def predicted(
    model: Model, given: Path | list[str], out: Path, options: OutputOptions | None = None, at_most: int = 10**6
) -> list[str]:
    """Predicts as the command does, and returns the names of what was not complete before."""
    options = options or OutputOptions()
    found = find_photos([str(given)] if isinstance(given, Path) else given, out)
    folder = PredictionFolder(out, model, options)
    chunks = cut_work(found, folder.complete(found), "cpu", 2)[:at_most]
    for records in predict_chunks(model, chunks, out, options, 2):
        folder.add(records)
    if at_most == 10**6:
        folder.write_tables(found)
    return sorted(each.name for chunk in chunks for each in chunk)


def table(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return [*csv.DictReader(file)]


def contents(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}


def test_labels_are_those_of_the_model(model: Model, photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert predicted(model, photos, out) == sorted(NAMES)
    rows = table(out / "index.csv")
    assert [Path(row["path"]).relative_to(photos).with_suffix("").as_posix() for row in rows] == NAMES
    for row, name in zip(rows, NAMES, strict=True):
        expected = model.predict(row["path"])
        with Image.open(out / f"labels/{name}.png") as image:
            assert image.mode == "P"
            assert image.getpalette()[: 3 * 7] == [channel for color in model.palette for channel in color]
            labels = np.asarray(image)
        # Alone and among others, sums of floats differ in their last bits: of pixels in a tie the label may, too.
        assert (labels != expected).mean() < 1e-3
        assert (int(row["height"]), int(row["width"])) == labels.shape
        fractions = [float(row[f"fraction/{each}"]) for each in model.classes]
        np.testing.assert_allclose(fractions, np.bincount(labels.ravel(), minlength=7) / labels.size, atol=1e-6)
        top = model.probabilities(row["path"]).max(-1)
        assert float(row["certainty"]) == pytest.approx(top.mean(), abs=1e-5)
        overlay = cv2.imread(str(out / f"overlays/{name}.jpg"), cv2.IMREAD_COLOR_RGB)
        painted = paint_mask(labels, model.palette, model.to_rgb(row["path"]))
        assert np.abs(overlay.astype(int) - painted).mean() < 12
    assert "disagreement" not in rows[0]
    assert {path.name for path in out.iterdir()} == {
        "labels",
        "overlays",
        "index.csv",
        "predict.json",
        "predicted.jsonl",
    }


def test_a_batch_is_that_of_the_networks(model: Model, photos: Path, tmp_path: Path) -> None:
    """Labels are bit for bit those of the same images passed together."""
    import torch

    out = tmp_path / "out"
    predicted(model, photos / "drive a", out)
    names = ["0", "1", "2", "été/grey 1", "été/路"]
    paths = [next((photos / "drive a").glob(f"{name}.*")) for name in names]
    together = torch.cat([model.to_tensor(path) for path in paths])
    expected = torch.cat([found.labels for _, found in model.strips(together)], dim=1).numpy()
    for name, labels in zip(names, expected, strict=True):
        assert np.array_equal(np.asarray(Image.open(out / f"labels/{name}.png")), labels)


@pytest.mark.parametrize("network", ["a", "b", "ensemble"])
def test_all_outputs(exported: Path, photos: Path, tmp_path: Path, network: str) -> None:
    model = load_model(exported, device="cpu", network=network)
    others = {name: load_model(exported, device="cpu", network=name) for name in "ab"}
    options = OutputOptions(False, True, True, True, True, sure=0.16)
    out = tmp_path / "out"
    predicted(model, photos, out, options)
    assert not (out / "overlays").exists()
    for row, name in zip(table(out / "index.csv"), NAMES, strict=True):
        prob = model.probabilities(row["path"])
        with np.load(out / f"probabilities/{name}.npz") as stored:
            assert stored["probabilities"].dtype == np.float16
            np.testing.assert_allclose(stored["probabilities"], prob, atol=1e-3)
        certainty = np.asarray(Image.open(out / f"certainty/{name}.png"))
        np.testing.assert_allclose(certainty, prob.max(-1) * 255, atol=0.51)
        entropy = -(prob * np.log(prob)).sum(-1) / np.log(7)
        np.testing.assert_allclose(np.asarray(Image.open(out / f"entropy/{name}.png")), entropy * 255, atol=0.51)
        differ = others["a"].predict(row["path"]) != others["b"].predict(row["path"])
        shown = np.asarray(Image.open(out / f"disagreement/{name}.png"))
        assert {*np.unique(shown)} <= {0, 255}
        assert ((shown == 255) != differ).mean() < 1e-3
        assert float(row["disagreement"]) == pytest.approx((shown == 255).mean(), abs=1e-6)
        assert float(row["sure"]) == pytest.approx((prob.max(-1) >= 0.16).mean(), abs=2e-3)


def test_the_ensemble_says_where_its_networks_disagree(exported: Path, photos: Path, tmp_path: Path) -> None:
    predicted(load_model(exported, device="cpu", network="ensemble"), photos, tmp_path / "out")
    assert all(0 < float(row["disagreement"]) <= 1 for row in table(tmp_path / "out/index.csv"))


def test_bad_files_are_listed_and_the_rest_is_done(model: Model, bad: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    predicted(model, bad, out)
    failed = {Path(row["path"]).name: row["error"] for row in table(out / "failed.csv")}
    assert failed.keys() == {"b.tif", "1.jpg", "film.png"}
    assert failed["b.tif"].startswith("the file is empty")
    assert failed["film.png"].startswith("the file is a video")
    assert len(table(out / "index.csv")) == len(NAMES) - 2
    assert not (out / "labels/b.png").exists()
    # A file that became good is predicted, one that became bad loses its files; failures are tried again.
    Image.fromarray(photo()).save(bad / "b.tif")
    (bad / "c.webp").write_bytes(b"RIFF")
    (bad / "film.png").unlink()
    assert predicted(model, bad, out) == ["b", "c", "drive a/1"]
    assert [Path(row["path"]).name for row in table(out / "failed.csv")] == ["c.webp", "1.jpg"]
    assert not (out / "labels/c.png").exists()
    assert not (out / "overlays/c.jpg").exists()
    Image.fromarray(photo()).save(bad / "c.webp")
    (bad / "drive a/1.jpg").unlink()
    assert predicted(model, bad, out) == ["c"]
    assert not (out / "failed.csv").exists()


def test_what_is_complete_is_not_predicted_again(model: Model, photos: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(photos, tmp_path / "photos"))
    whole, out = tmp_path / "whole", tmp_path / "out"
    predicted(model, source, whole)
    first = predicted(model, source, out, at_most=2)
    assert 0 < len(first) < len(NAMES)
    with (out / "predicted.jsonl").open("a") as file:
        file.write('{"name": "wide", "by')  # as a kill leaves it
    (out / "labels/.wide.png.1.tmp").write_bytes(b"half")
    assert predicted(model, source, out) == sorted({*NAMES} - {*first})
    assert contents(out).keys() == contents(whole).keys()
    assert {name: data for name, data in contents(out).items() if name != "predicted.jsonl"} == {
        name: data for name, data in contents(whole).items() if name != "predicted.jsonl"
    }
    assert predicted(model, source, out) == []
    os.utime(source / "wide.png", ns=(1, 1))
    (out / "overlays/large.jpg").unlink()
    assert predicted(model, source, out) == ["large", "wide"]


def test_a_folder_of_something_else_is_refused(exported: Path, model: Model, photos: Path, tmp_path: Path) -> None:
    def refused(match: str, **arguments: Any) -> None:
        settings = {"model": model, "given": photos, "out": out, **arguments}
        before = contents(out)
        with pytest.raises(DataError, match=match) as err:
            predicted(**settings)
        assert "\n" not in str(err.value)
        assert contents(out) == before

    out = tmp_path / "full"
    out.mkdir()
    (out / "thesis.tex").write_text("x")
    refused("holds other files; name another folder")
    out = tmp_path / "out"
    predicted(model, photos, out)
    refused("predictions of network a", model=load_model(exported, device="cpu", network="b"))
    refused("made with certainty false, not true; give the same options", options=OutputOptions(certainty=True))
    refused("made with sure 0.9, not 0.5", options=OutputOptions(sure=0.5))
    other = Path(shutil.copytree(exported, tmp_path / "other"))
    weights = bytearray((other / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (other / "model.safetensors").write_bytes(weights)
    refused("is another network or has changed since", model=load_model(other, device="cpu"))
    moved = Path(shutil.copytree(photos, tmp_path / "moved"))
    refused("by the name that", given=moved)
    (out / "predict.json").write_text("{")
    refused("must be as `predict` writes it")


def test_photos_of_one_name_are_told_before_anything(photos: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(photos, tmp_path / "photos"))
    Image.fromarray(photo()).save(source / "wide.jpg")
    with pytest.raises(DataError, match=r"would both become labels/wide\.png; rename one"):
        find_photos([str(source)], tmp_path / "out")


def test_folders_patterns_files_and_lists(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def names(*given: str) -> list[str]:
        return [each.name for each in find_photos(given, tmp_path / "out")]

    assert names(str(photos)) == NAMES
    assert names(str(photos), str(photos / "b.tif")) == NAMES, "each photo once"
    monkeypatch.chdir(photos)
    assert names("drive a/*.jpg", "b.tif") == ["0", "1", "2", "b"]
    assert names("**/*.png") == ["drive a/été/grey 1", "drive a/été/路", "large", "wide"]
    listed = photos.parent / "some.txt"
    listed.write_text(
        f"photos/drive a/0.jpg\n\nphotos/missing.png\n{photos}/c.webp\n../{photos.parent.name}/photos/b.tif\r\n"
    )
    assert names(str(listed)) == ["photos/drive a/0", "photos/missing", "c", "b"]
    assert [each.bytes for each in find_photos([str(listed)], tmp_path)][1] == -1
    for given, text in {
        "no/such": "there is no such file",
        "*.gif": "must hold images",
        str(tmp_path): "but has none",
    }.items():
        with pytest.raises(DataError, match=text):
            names(given)


def test_own_output_is_no_input(model: Model, photos: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(photos, tmp_path / "photos"))
    predicted(model, source, source / "out")
    assert predicted(model, source, source / "out") == []
    with pytest.raises(DataError, match="must be another folder than that of the images"):
        predicted(model, source, source)


def test_chunks_are_of_one_size_and_bounded(tmp_path: Path) -> None:
    found = []
    for number, size in enumerate([(10, 20), (20, 10), (10, 20), (30, 30), (10, 20), (20, 10), (99, 99)]):
        path = tmp_path / f"{number}.png"
        Image.fromarray(photo(*size)).save(path)
        found.append(Photo(str(path), str(number), path.stat().st_size, 0))
    found += [Photo("no/such.png", "none", -1, 0), Photo(str(tmp_path / "0.png"), "huge", 2**30, 0)]
    chunks = cut_into_chunks(found, {"6": (10, 20)}, 400, 2)
    assert [[each.name for each in chunk] for chunk in chunks] == [
        ["none"], ["huge"], ["3"], ["0", "2"], ["4", "6"], ["1", "5"],
    ]  # fmt: skip


def test_a_size_that_the_header_did_not_say(model: Model, photos: Path, tmp_path: Path) -> None:
    """A chunk whose photos turn out to differ in size."""
    paths = [photos / "drive a/0.jpg", photos / "b.tif", photos / "c.webp"]
    chunk = [Photo(str(path), path.stem, 1, 1) for path in paths]
    (records,) = predict_chunks(model, [chunk], tmp_path, OutputOptions(), 2)
    assert [(each["height"], each["width"]) for each in records] == [(32, 48), (50, 40), (32, 48)]
    for path in paths:
        found = np.asarray(Image.open(tmp_path / f"labels/{path.stem}.png"))
        assert np.array_equal(found, model.predict(path))


def test_a_photo_that_cannot_be_written_ends_it(model: Model, photos: Path, tmp_path: Path) -> None:
    (tmp_path / "labels").write_text("in the way")
    with pytest.raises((OSError, CpsRayError)):
        [*predict_chunks(model, [[Photo(str(photos / "b.tif"), "b", 1, 1)]], tmp_path, OutputOptions(), 2)]


def test_settings_say_what_the_values_are(model: Model, photos: Path, tmp_path: Path) -> None:
    predicted(model, photos, tmp_path / "out")
    settings = json.loads((tmp_path / "out/predict.json").read_text())
    assert settings["classes"] == [*model.classes]
    assert settings["network"] == "a"
    assert len(settings["fingerprint"]) == 64
