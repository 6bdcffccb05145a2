"""`cps_ray.init` on trees as people have them: each goes through the recipe, preparation and its own sweep, with right pixels."""

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from trees import patches, save, scene

import cps_ray
from cps_ray import init, prepare, sweep
from cps_ray.config.reader import load_sweep, load_train
from cps_ray.datasets.images import decode_mask
from cps_ray.datasets.loader import check_data
from cps_ray.datasets.prepare.recipe import load_recipe, voc_color
from cps_ray.datasets.shards import open_shards

Pixels = NDArray[np.uint8]
SIZE = (48, 64)
NUMBERS = [f"{number:04d}" for number in range(12)]


def photo(path: Path, size: tuple[int, int] = SIZE, **options: Any) -> Path:
    return save(path, scene(path.stem, size), **options)


def mask(key: str, ids: tuple[int, ...] = (0, 1, 2), size: tuple[int, int] = SIZE) -> Pixels:
    return patches(key, ids, size)


def stored(out: Path, split: str | None = None) -> dict[str, Pixels]:
    """Returns id -> train ids of every labelled image."""
    shards, masks = open_shards(out), {}
    for name in [split] if split else shards.manifest.splits:
        locations = shards.index(name).locations
        for encoded in locations.read(list(range(len(locations.ids)))):
            if encoded.mask is not None:
                masks[encoded.id] = decode_mask(encoded.mask)
    return masks


class Case:
    """What a tree is given to `init` as, and what must come out."""

    def __init__(self, words: list[str], counts: tuple[int, int, int], expected: dict[str, Pixels]) -> None:
        self.words, self.counts, self.expected = words, counts, expected


def one_folder(root: Path) -> Case:
    for key in NUMBERS:
        photo(root / f"data/{key}.jpg")
    for key in NUMBERS[:6]:
        save(root / f"data/{key}.png", mask(key))
    return Case(["data"], (6, 6, 3), {key: mask(key) for key in NUMBERS[:6]})


def two_folders(root: Path) -> Case:
    for key in NUMBERS:
        photo(root / f"photos/{key}.JPG", format="JPEG")
        save(root / f"masks/{key}.png", np.where(mask(key, (0, 1)) == 1, 255, 0).astype(np.uint8))
    return Case(["photos", "masks"], (12, 0, 2), {key: mask(key, (0, 1)) for key in NUMBERS})


def named_masks(root: Path) -> Case:
    for key in NUMBERS:
        photo(root / f"scans/{key}_rgb.png")
    for key in NUMBERS[:7]:
        save(root / f"scans/{key}_mask.png", mask(key))
    return Case(["scans"], (7, 5, 3), {key: mask(key) for key in NUMBERS[:7]})


def prefixed_masks(root: Path) -> Case:
    for key in NUMBERS:
        photo(root / f"a/img_{key}.jpg")
        save(root / f"b/mask_{key}.png", mask(key))
    return Case(["a", "b"], (12, 0, 3), {key: mask(key) for key in NUMBERS})


def odd_names(root: Path) -> Case:
    folder = root / "my photos [v2] 100%"
    for number in range(8):
        photo(folder / f"été #{number}.jpg")
        save(folder / f"masks/été #{number}.png", mask(str(number)))
    return Case([folder.name], (8, 0, 3), {f"été #{number}": mask(str(number)) for number in range(8)})


def split_folders(root: Path) -> Case:
    expected = {}
    for split, part in (("train", NUMBERS[:6]), ("val", NUMBERS[6:9]), ("test", NUMBERS[9:])):
        for key in part:
            photo(root / f"set/images/{split}/{key}.png")
            save(root / f"set/labels/{split}/{key}.png", mask(key))
            expected[key] = mask(key)
    photo(root / "set/images/train/more.png")
    return Case(["set"], (12, 1, 3), expected)


def split_first(root: Path) -> Case:
    for split, part in (("train", NUMBERS[:8]), ("test", NUMBERS[8:])):
        for key in part:
            photo(root / f"set/{split}/images/{key}.jpg")
            save(root / f"set/{split}/masks/{key}.png", mask(key))
    return Case(["set"], (12, 0, 3), {key: mask(key) for key in NUMBERS})


def nested(root: Path) -> Case:
    expected = {}
    for drive in ("a", "b", "c"):
        for key in NUMBERS[:4]:
            save(root / f"set/images/{drive}/{key}.jpg", scene(drive + key, SIZE))
            save(root / f"set/masks/{drive}/{key}.png", mask(drive + key))
            expected[f"{drive}/{key}"] = mask(drive + key)
    return Case(["set"], (12, 0, 3), expected)


def elsewhere(root: Path) -> Case:
    for key in NUMBERS[:6]:
        photo(root / f"data/{key}.jpg")
        save(root / f"data/seg/{key}.png", mask(key))
    for number in range(4):
        photo(root / f"drone/day {number}/x{number}.jpg")
    return Case(["data", "--unlabeled", "drone"], (6, 4, 3), {key: mask(key) for key in NUMBERS[:6]})


def unpaired(root: Path) -> Case:
    case = two_folders(root)
    save(root / "masks/alone.png", mask("alone", (0, 1)) * np.uint8(255))
    return case


def palette(root: Path) -> Case:
    table = [channel for index in range(256) for channel in voc_color(index)]
    for key in NUMBERS:
        photo(root / f"JPEGImages/{key}.jpg")
        save(root / f"SegmentationClass/{key}.png", mask(key, (0, 1, 2, 255)), table)
    return Case(["."], (12, 0, 3), {key: mask(key, (0, 1, 2, 255)) for key in NUMBERS})


def colors(root: Path) -> Case:
    table = np.array([(0, 0, 0), (0, 128, 0), (200, 0, 0)], np.uint8)
    for key in NUMBERS:
        photo(root / f"x/{key}.jpg")
        save(root / f"y/{key}.png", table[mask(key)])
    return Case(["x", "y"], (12, 0, 3), {key: mask(key) for key in NUMBERS})


def labelmap(root: Path) -> Case:
    table = np.array([(0, 0, 0), (250, 50, 83), (51, 221, 255)], np.uint8)
    for key in NUMBERS:
        photo(root / f"JPEGImages/{key}.jpg")
        save(root / f"SegmentationClass/{key}.png", table[mask(key)])
    lines = ["# label:color_rgb:parts:actions", "background:0,0,0::", "car:250,50,83::", "a, b:51,221,255::"]
    (root / "labelmap.txt").write_text("\n".join(lines))
    return Case(["."], (12, 0, 3), {key: mask(key) for key in NUMBERS})


def jpeg_masks(root: Path) -> Case:
    for key in NUMBERS:
        photo(root / f"x/{key}.png")
        save(root / f"y/{key}.jpg", np.kron(mask(key, (0, 1), (6, 8)), np.full((8, 8), 255, np.uint8)), quality=95)
    return Case(
        ["x", "y"], (12, 0, 2), {key: np.kron(mask(key, (0, 1), (6, 8)), np.ones((8, 8), np.uint8)) for key in NUMBERS}
    )


def transparent(root: Path) -> Case:
    for key in NUMBERS:
        photo(root / f"x/{key}.jpg")
        on = mask(key, (0, 1))[..., None] == 1
        save(root / f"y/{key}.png", np.where(on, (255, 0, 0, 255), (9, 9, 9, 0)).astype(np.uint8))
    return Case(["x", "y"], (12, 0, 2), {key: mask(key, (0, 1)) for key in NUMBERS})


def smaller_masks(root: Path) -> Case:
    for key in NUMBERS:
        photo(root / f"x/{key}.jpg", (96, 128))
        save(root / f"y/{key}.png", mask(key))
    return Case(["x", "y"], (12, 0, 3), {key: np.kron(mask(key), np.ones((2, 2), np.uint8)) for key in NUMBERS})


def class_folders(root: Path) -> Case:
    expected = {}
    for key in NUMBERS:
        photo(root / f"x/{key}.jpg")
        expected[key] = mask(key)
        for label, name in ((1, "crop"), (2, "weed")):
            save(root / f"masks/{name}/{key}.png", ((expected[key] == label) * 255).astype(np.uint8))
    return Case(["x", "masks"], (12, 0, 3), expected)


def square(label: str) -> dict[str, Any]:
    points = [[8, 8], [40, 8], [40, 40], [8, 40]]
    return {"label": label, "points": points, "shape_type": "polygon", "group_id": None, "flags": {}}


def labelme(root: Path) -> Case:
    for number, key in enumerate(NUMBERS):
        photo(root / f"x/{key}.jpg")
        if number < 8:
            shapes = [square("a: #b" if number % 2 else "%c")]
            text = {"shapes": shapes, "imagePath": f"{key}.jpg", "imageHeight": SIZE[0], "imageWidth": SIZE[1]}
            (root / f"x/{key}.json").write_text(json.dumps(text | {"version": "5.0.1", "flags": {}, "imageData": None}))
    return Case(["x"], (8, 4, 3), {})


def coco(root: Path) -> Case:
    for split, part in (("train", NUMBERS[:6]), ("valid", NUMBERS[6:9]), ("test", NUMBERS[9:])):
        images, annotations = [], []
        for number, key in enumerate(part):
            photo(root / f"{split}/{key}.jpg")
            images.append({"id": number, "file_name": f"{key}.jpg", "height": SIZE[0], "width": SIZE[1]})
            outline = [[8, 8, 40, 8, 40, 40, 8, 40]]
            about = {"id": number, "image_id": number, "category_id": 1, "segmentation": outline, "iscrowd": 0}
            annotations.append(about | {"bbox": [8, 8, 32, 32], "area": 1024})
        categories = [{"id": 0, "name": "my-set"}, {"id": 1, "name": "leaf"}]
        text = {"images": images, "annotations": annotations, "categories": categories}
        (root / split / "_annotations.coco.json").write_text(json.dumps(text))
    inside = np.zeros(SIZE, np.uint8)
    inside[8:40, 8:40] = 1
    return Case(["."], (12, 0, 2), dict.fromkeys(NUMBERS, inside))


def cvat_coco(root: Path) -> Case:
    case = coco(root)
    whole = json.loads((root / "train/_annotations.coco.json").read_text())
    for split in ("train", "valid", "test"):
        (root / split / "_annotations.coco.json").unlink()
    for path in [*root.glob("*/*.jpg")]:
        if path.stem in NUMBERS[:6]:
            (root / "e/images/default").mkdir(parents=True, exist_ok=True)
            path.rename(root / "e/images/default" / path.name)
    (root / "e/annotations").mkdir()
    (root / "e/annotations/instances_default.json").write_text(json.dumps(whole))
    return Case(["e"], (6, 0, 2), {key: case.expected[key] for key in NUMBERS[:6]})


def yolo(root: Path) -> Case:
    for split, part in (("train", NUMBERS[:8]), ("val", NUMBERS[8:])):
        for key in part:
            photo(root / f"y/images/{split}/{key}.jpg")
            path = root / f"y/labels/{split}/{key}.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("0 0.125 0.25 0.5 0.25 0.5 0.75 0.125 0.75\n")
    (root / "y/data.yaml").write_text("names: [leaf, stem]\ntrain: images/train\nval: images/val\n")
    return Case(["y"], (12, 0, 3), {})


def deep_photos(root: Path) -> Case:
    for key in NUMBERS:
        save(root / f"x/{key}.tif", scene(key, SIZE)[..., 0].astype(np.uint16) * 40)
        np.save(root / f"x/{key}.npy", mask(key))
    return Case(["x"], (12, 0, 3), {key: mask(key) for key in NUMBERS})


CASES = [
    one_folder, two_folders, named_masks, prefixed_masks, odd_names, split_folders, split_first, nested, elsewhere, unpaired, palette, colors,
    labelmap, jpeg_masks, transparent, smaller_masks, class_folders, labelme, coco, cvat_coco, yolo, deep_photos,
]  # fmt: skip


@pytest.mark.parametrize("make", CASES, ids=lambda make: make.__name__)
def test_what_init_writes_runs_as_it_is(
    make: Callable[[Path], Case], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "root"
    case = make(root)
    monkeypatch.chdir(root)
    assert init.main([*case.words, "--output", "../mine it's"]) == 0
    said = capsys.readouterr().out.splitlines()
    labeled, unlabeled, classes = case.counts
    assert said[-2] == f"ok: {labeled} labelled, {unlabeled} unlabelled, {classes} classes"
    out = tmp_path / "mine it's"
    load_recipe(out / "recipe.yaml")
    with Image.open(out / "overlays.png") as sheet:
        assert sheet.width > 500
    command = shlex.split(said[-1].removeprefix("next: "))
    assert command[:3] == ["python", "-m", "cps_ray.prepare"]
    assert prepare.main(command[3:]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[-2] == f"ok: {labeled} labelled, {unlabeled} unlabelled, {classes} classes"
    assert shlex.split(said[-1]) == ["next:", "python", "-m", "cps_ray.sweep", "../mine it's/sweep.yaml"]
    found = stored(out / "shards")
    assert len(found) == labeled
    for key, expected in case.expected.items():
        np.testing.assert_array_equal(found[key], expected, err_msg=key)
    train = load_sweep(out / "sweep.yaml").train
    check_data(open_shards(train.data.shards), train)


def test_a_second_run_leaves_what_was_edited(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    one_folder(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert init.main(["data"]) == 0
    recipe, sweep_file = Path("data-cps/recipe.yaml"), Path("data-cps/sweep.yaml")
    edited = recipe.read_text().replace("class_1", "leaf")
    recipe.write_text(edited)
    first = sweep_file.read_text()
    photo(tmp_path / "data/more.jpg")
    capsys.readouterr()
    assert init.main(["data"]) == 0
    assert "data-cps/recipe.yaml was edited and stays" in capsys.readouterr().out
    assert recipe.read_text() == edited
    assert "class_1" in Path("data-cps/recipe.new.yaml").read_text()
    assert sweep_file.read_text() != first  # nobody had edited it


def no_masks(root: Path) -> None:
    photo(root / "data/a.jpg")


def no_pairs(root: Path) -> None:
    for number in range(4):
        photo(root / f"data/photo{number}.jpg")
        save(root / f"data/masks/{number}{number}.png", mask(str(number)))


def one_value(root: Path) -> None:
    for number in range(4):
        photo(root / f"data/{number}.jpg")
        save(root / f"data/masks/{number}.png", np.zeros(SIZE, np.uint8))


def photos_as_masks(root: Path) -> None:
    for number in range(4):
        photo(root / f"data/{number}.jpg")
        photo(root / f"data/masks/{number}.png")


def damaged(root: Path) -> None:
    for number in range(4):
        photo(root / f"data/{number}.jpg")
        save(root / f"data/masks/{number}.png", mask("a")).write_bytes(b"no image")


def nothing(root: Path) -> None:
    (root / "data").mkdir()


@pytest.mark.parametrize("make", [no_masks, no_pairs, one_value, photos_as_masks, damaged, nothing])
def test_what_cannot_be_is_one_line_and_nothing_is_written(
    make: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path)
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    assert init.main(["data"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_output_must_not_lie_in_the_photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one_folder(tmp_path)
    monkeypatch.chdir(tmp_path / "data")
    assert init.main([".", "--output", "mine"]) == 2
    assert init.main(["."]) == 0
    assert (tmp_path / "data-cps/recipe.yaml").exists()


@pytest.mark.parametrize("turned", [True, False])
def test_edges_show_how_masks_lie_on_turned_photos(
    turned: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    exif = Image.Exif()
    exif[0x0112] = 3
    for key in NUMBERS:
        seen = mask(key, (0, 1, 2))
        photo = np.array([(20, 20, 20), (120, 200, 80), (230, 60, 60)], np.uint8)[seen]
        save(tmp_path / f"x/{key}.jpg", photo[::-1, ::-1], exif=exif, quality=95)
        save(tmp_path / f"y/{key}.png", seen if turned else seen[::-1, ::-1])
    out = tmp_path / "out"
    assert init.main([str(tmp_path / "x"), str(tmp_path / "y"), "--output", str(out)]) == 0
    assert load_recipe(out / "recipe.yaml").masks_turned is turned
    assert prepare.main(["folder", str(tmp_path), str(out / "shards"), "--recipe", str(out / "recipe.yaml")]) == 0
    for key, found in stored(out / "shards").items():
        np.testing.assert_array_equal(found, mask(key))


@pytest.mark.ray
def test_the_plain_folder_becomes_a_sweep_in_four_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(80):
        photo(tmp_path / f"crops/{number:03d}.jpg")
        if number < 24:
            save(tmp_path / f"crops/{number:03d}.png", mask(str(number)))
    monkeypatch.chdir(tmp_path)
    assert init.main(["crops"]) == 0
    assert prepare.main(["folder", "crops", "crops-cps/shards", "--recipe", "crops-cps/recipe.yaml"]) == 0
    assert sweep.main(["crops-cps/sweep.yaml", "--dry-run"]) == 0
    small = [
        "budget.trials=2",
        "train.schedule.steps=4",
        "train.schedule.eval_every=2",
        "early_stopping.grace=2",
        "final.folds=3",
        "final.nested=true",
        "baselines.supervised-only.trials=1",
    ]
    small += ["train.resources={workers: 1, cpus_per_worker: 0.5}"]
    assert sweep.main(["crops-cps/sweep.yaml", *(word for text in small for word in ("--set", text))]) == 0
    root = Path("crops-cps/runs/crops-cps")
    assert (root / "best.yaml").exists()
    final = cps_ray.open_sweep(root).summary["final"]
    (verdict,) = final["difference"].values()
    assert (verdict["tuned"], verdict["trainings"], verdict["images"], final["apart"]) == (True, 3, 24, {})
    for fold in (2, 3):
        trial = load_train(root / f"folds/{fold}/trials/0001/config.yaml").data.folds
        assert (trial.held_out, trial.aside) == (fold % 3, fold - 1)
        assert (root / f"folds/{fold}/baselines/supervised-only/trials/0000/config.yaml").exists()
        trained = load_train(root / f"final/best-fold{fold}/config.yaml").data.folds
        assert (trained.held_out, trained.aside) == (fold - 1, None)
