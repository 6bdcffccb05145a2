"""Layouts of raw data sets on disk: every file is found, paired and put in the right split."""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trees
from trees import city_id, save, scene

from cps_ray.datasets.images import decode_mask
from cps_ray.datasets.prepare import layouts
from cps_ray.datasets.prepare.items import FromFiles, MaskFile, Source
from cps_ray.datasets.prepare.layouts import CAMVID, RawData
from cps_ray.datasets.prepare.recipe import Recipe
from cps_ray.errors import DataError

MASK = np.array([[0, 1, 2, 0], [1, 1, 2, 0]], np.uint8)
PAIR = {"images": "images/*", "masks": "masks/*"}


def recipe(splits: Mapping[str, Any] | None = None, classes: int = 3) -> Recipe:
    entries = [{"name": f"c{train_id}", "color": (train_id, 0, 0)} for train_id in range(classes)]
    return Recipe.model_validate({"classes": entries, "splits": splits or {"train": PAIR}})


def ids(raw: RawData, split: str) -> list[str]:
    return [source.id for source in raw.splits[split]]


def labeled(raw: RawData, split: str) -> list[str]:
    return [source.id for source in raw.splits[split] if source.mask]


def mask_of(raw: RawData, source: Source) -> list[list[int]]:
    item = FromFiles(raw.reader, raw.value_range)(source)
    assert item.mask is not None
    return decode_mask(item.mask).tolist()


# ------------------------------------------------------------------------------------------------------ any folder


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    for name in ("a", "b"):
        save(tmp_path / f"raw/images/{name}.jpg", scene(name, (2, 4)))
        save(tmp_path / f"raw/masks/{name}.png", MASK)
    return tmp_path / "raw"


def test_images_and_masks_are_paired_by_name(raw: Path) -> None:
    found = layouts.folder(raw, recipe())
    assert found.splits["train"] == tuple(
        Source(name, str(raw / f"images/{name}.jpg"), (MaskFile(str(raw / f"masks/{name}.png")),)) for name in "ab"
    )
    assert mask_of(found, found.splits["train"][0]) == MASK.tolist()
    assert found.findings == ()


def test_stem_patterns_sub_folders_and_unlabeled_images(tmp_path: Path) -> None:
    for name in ("bonn_1", "bonn_2", "kiel_1", "kiel_2"):
        save(tmp_path / f"images/deep/{name}_photo.png", scene(name))
        save(tmp_path / f"masks/{name}_ids.png", MASK)
    save(tmp_path / "more/bonn_9_photo.png", scene("9"))
    save(tmp_path / "more/again/bonn_8.tif", scene("8"))
    (tmp_path / "more/.hidden").write_text("no image")
    (tmp_path / "more/Thumbs.db").write_text("no image")
    both = {"images": "images/**/{id}_photo.png", "masks": "masks/{id}_ids.*"}
    splits = {
        "train": {**both, "unlabeled": ["more/{id}_photo.*", "more/*/*"], "exclude": "kiel_*"},
        "val": {**both, "include": ["kiel_*"], "exclude": ["kiel_2"], "prefix": "val/"},
    }
    found = layouts.folder(tmp_path, recipe(splits))
    assert ids(found, "train") == ["bonn_1", "bonn_2", "bonn_8", "bonn_9"]
    assert labeled(found, "train") == ["bonn_1", "bonn_2"]
    assert ids(found, "val") == ["val/kiel_1"]


def test_every_kind_of_file_at_once(tmp_path: Path) -> None:
    """Images of six kinds and several sizes; masks as index and palette PNG, TIFF, .npy and .mat."""
    kinds = {"png": ".npy", "jpg": ".mat", "tif": ".png", "bmp": ".tif", "webp": ".png", "JPG": ".bmp"}
    for number, (kind, mask_kind) in enumerate(kinds.items()):
        size = (20 + number, 30)
        save(tmp_path / f"images/{kind}_.{kind}", scene(kind, size))
        mask, path = trees.patches(kind, range(3), size), tmp_path / f"masks/{kind}_{mask_kind}"
        path.parent.mkdir(exist_ok=True)
        if mask_kind == ".npy":
            np.save(path, mask)
        elif mask_kind == ".mat":
            trees.mat(path, mask)
        else:
            save(path, mask, trees.PALETTE if kind == "tif" else None)
    found = layouts.folder(tmp_path, recipe())
    assert len(found.splits["train"]) == 6
    for source in found.splits["train"]:
        size = (20 + list(kinds).index(source.id[:-1]), 30)
        assert mask_of(found, source) == trees.patches(source.id[:-1], range(3), size).tolist()


def test_a_list_picks_the_images_of_a_split(raw: Path) -> None:
    (raw / "val.txt").write_text("images/b.jpg masks/b.png")
    splits = {"train": {**PAIR, "exclude": "b"}, "val": {**PAIR, "list": "val.txt"}}
    found = layouts.folder(raw, recipe(splits))
    assert (ids(found, "train"), ids(found, "val")) == (["a"], ["b"])


def test_lists_must_fit_the_files(raw: Path) -> None:
    listed = recipe({"train": {**PAIR, "list": "train.txt"}})
    (raw / "train.txt").write_text("a\nc\nd\n")
    with pytest.raises(DataError, match=r"train.txt:2: 'c' is no image of split train, .* nor are 1 more of 3"):
        layouts.folder(raw, listed)
    (raw / "train.txt").write_text("a\nimages/a.jpg\n")
    with pytest.raises(DataError, match=r"train.txt:2: 'images/a.jpg' is listed twice, first in line 1"):
        layouts.folder(raw, listed)


def test_what_has_no_partner_is_found_file_by_file(raw: Path) -> None:
    for name in "cd":
        save(raw / f"images/{name}.jpg", scene(name))
    save(raw / "masks/x.png", MASK)
    found = layouts.folder(raw, recipe())
    assert [(Path(finding.where).name, finding.fatal) for finding in found.findings] == [
        ("c.jpg", True),
        ("d.jpg", True),
        ("x.png", True),
    ]
    assert "'c' has none (of 2 such); add the mask, fix the patterns" in found.findings[0].line
    assert "the mask 'x' has no image" in found.findings[2].line
    assert ids(found, "train") == ["a", "b"]


def test_a_link_that_leads_nowhere_is_an_image_that_cannot_be_read(raw: Path) -> None:
    """git-annex leaves such links; dropping these images without a word would make the data set smaller."""
    (raw / "more").mkdir()
    (raw / "more/c.jpg").symlink_to("not/fetched.jpg")
    found = layouts.folder(raw, recipe({"train": {**PAIR, "unlabeled": "more/*"}}))
    assert ids(found, "train") == ["a", "b", "c"]
    with pytest.raises(DataError, match=r"c.jpg: the file cannot be read \(No such file or directory\); get it again"):
        FromFiles(found.reader)(found.splits["train"][2])


@pytest.mark.parametrize(
    ("split", "message"),
    [
        ({"masks": "labels/*"}, r"splits.train.masks 'labels/\*' must match files, but matches none"),
        (
            {"masks": "masks"},
            r"'masks' must match files, but matches none; for all files of this folder, write masks/\*\.",
        ),
        ({"include": ["z*"]}, r"splits.train.include 'z\*' must match ids, but matches none; they look like 'a'"),
        ({"exclude": ["a", "B"]}, "splits.train.exclude 'B' must match ids"),
        ({"exclude": ["?"]}, "split train must have images, but `list`, `include` and `exclude` leave none"),
        ({"unlabeled": "images/*"}, "labelled or unlabelled, but both list a, b"),
    ],
)
def test_splits_that_cannot_be(raw: Path, split: dict[str, str], message: str) -> None:
    with pytest.raises(DataError, match=message):
        layouts.folder(raw, recipe({"train": PAIR | split}))


def test_paths_are_absolute_wherever_the_command_is_started(raw: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(raw)
    found = layouts.folder(Path(), recipe())
    assert all(os.path.isabs(source.image) for source in found.splits["train"])


# ---------------------------------------------------------------------------------------------------------- CamVid


def test_camvid(tmp_path: Path) -> None:
    found = layouts.camvid(trees.camvid(tmp_path))
    assert {name: ids(found, name) for name in found.splits} == {
        name: [f"{name}0", f"{name}1"] for name in ("train", "val", "test")
    }
    (source, _) = found.splits["val"]
    mask = trees.patches("val0", range(12))
    assert mask_of(found, source) == np.where(mask == 11, 255, mask).tolist()


def test_missing_raw_data_says_what_is_expected(tmp_path: Path) -> None:
    message = r"nope: no such folder; it must be the folder that holds train/\*, trainannot/\*"
    with pytest.raises(DataError, match=message):
        layouts.camvid(tmp_path / "nope")


@pytest.mark.skipif("CAMVID" not in os.environ, reason="CAMVID, the folder of raw CamVid, is not set")
def test_real_camvid() -> None:
    found = layouts.camvid(Path(os.environ["CAMVID"]))
    assert {name: len(sources) for name, sources in found.splits.items()} == {"train": 367, "val": 101, "test": 233}
    counts = np.zeros(256, np.int64)
    for source in found.splits["train"]:
        assert source.mask is not None
        raw = found.reader.read(source.mask, Path(source.mask).read_bytes())
        counts += np.bincount(found.reader.train_ids(source.mask, raw)[0].ravel(), minlength=256)
    percentages = dict(zip([entry.name for entry in CAMVID.classes], 100 * counts / counts.sum(), strict=False))
    assert percentages["Road"] == pytest.approx(31.66, abs=0.01)
    assert percentages["Bicyclist"] == pytest.approx(0.29, abs=0.01)
    assert 100 * counts[255] / counts.sum() == pytest.approx(3.95, abs=0.01)


# ------------------------------------------------------------------------------------------------------ Cityscapes


def test_cityscapes_table_is_the_official_one() -> None:
    """The table maps labelId to trainId as cityscapesScripts' labels.py does."""
    wanted = {7: 0, 8: 1, 11: 2, 12: 3, 13: 4, 17: 5, 19: 6, 20: 7, 21: 8, 22: 9, 23: 10}
    wanted |= {24: 11, 25: 12, 26: 13, 27: 14, 28: 15, 31: 16, 32: 17, 33: 18}
    assert wanted == trees.TRAIN_IDS
    assert layouts.CITYSCAPES[13].name == "car"
    assert layouts.CITYSCAPES[13].color == (0, 0, 142)


def test_cityscapes_without_its_withheld_labels(tmp_path: Path) -> None:
    """`test` is the official val set, `val` three cities of train; dummy labels of the official test set are not used."""
    found = layouts.cityscapes(trees.cityscapes(tmp_path))
    assert ids(found, "train") == [city_id("aachen", n) for n in range(3)] + [city_id("bochum", n) for n in range(2)]
    assert ids(found, "val") == [city_id(city, 0) for city in ("cologne", "krefeld", "ulm")]
    assert ids(found, "test") == [city_id("frankfurt", 0), city_id("frankfurt", 1), city_id("munster", 0)]
    assert all(labeled(found, name) == ids(found, name) for name in found.splits)
    assert found.findings == ()


def test_cityscapes_as_published_with_all_that_is_unlabelled(tmp_path: Path) -> None:
    found = layouts.cityscapes(trees.cityscapes(tmp_path), published=True, unlabeled=["train_extra", "test"])
    assert list(found.splits) == ["train", "val"]
    assert len(labeled(found, "train")) == 8
    bare = set(ids(found, "train")) - set(labeled(found, "train"))
    assert bare == {city_id(city, frame) for city in ("erlangen", "berlin") for frame in range(2)}
    assert len(ids(found, "val")) == 3


@pytest.mark.parametrize("kinds", [("labelIds",), ("labelTrainIds",), ("labelIds", "labelTrainIds")], ids="+".join)
def test_cityscapes_labels_of_both_kinds_mean_the_same(tmp_path: Path, kinds: tuple[str, ...]) -> None:
    found = layouts.cityscapes(trees.cityscapes(tmp_path, kinds=kinds))
    assert found.notes == (f"masks hold {kinds[0]}",)
    for source in found.splits["train"]:
        wanted = trees.train_ids(trees.patches(source.id, trees.CITY_IDS))
        assert mask_of(found, source) == wanted.tolist()


@pytest.mark.parametrize("kind", ["labelIds", "labelTrainIds"])
def test_names_and_values_of_cityscapes_must_not_contradict(tmp_path: Path, kind: str) -> None:
    raw = trees.cityscapes(tmp_path, kinds=(kind,))
    other = "labelTrainIds" if kind == "labelIds" else "labelIds"
    for path in raw.glob(f"gtFine/*/*/*_{kind}.png"):
        ids = trees.patches(path.name, trees.CITY_IDS)
        save(path, trees.train_ids(ids) if kind == "labelIds" else ids)
    message = rf"files named {kind} must hold {kind}, but a sample .* as {other} do; rename .* to \*_gtFine_{other}.png"
    with pytest.raises(DataError, match=message):
        layouts.cityscapes(raw)

    for path in raw.glob(f"gtFine/*/*/*_{kind}.png"):
        path.rename(path.with_name(path.name.replace(kind, other)))
    found = layouts.cityscapes(raw)
    assert found.notes == (f"masks hold {other}",)
    source = found.splits["train"][0]
    assert source.mask is not None
    wanted = trees.train_ids(trees.patches(Path(source.mask).name.replace(other, kind), trees.CITY_IDS))
    assert mask_of(found, source) == wanted.tolist()


def test_cityscapes_kinds_are_distinguished_by_names_where_values_do_not_decide(tmp_path: Path) -> None:
    raw = trees.cityscapes(tmp_path, kinds=("labelTrainIds",))
    for path in raw.glob("gtFine/*/*/*_labelTrainIds.png"):
        save(path, trees.patches(path.name, (7, 8, 11)))  # no 255, nothing above 18
    assert layouts.cityscapes(raw).notes == ("masks hold labelTrainIds",)


def test_one_cityscapes_mask_of_the_other_kind_is_refused(tmp_path: Path) -> None:
    raw = trees.cityscapes(tmp_path)
    stray = raw / f"gtFine/train/aachen/{city_id('aachen', 1)}_gtFine_labelIds.png"
    save(stray, trees.train_ids(trees.patches("stray", trees.CITY_IDS)))
    found = layouts.cityscapes(raw)
    with pytest.raises(
        DataError, match=r"masks must all be labelIds, but this one holds 0..18 and 255, .* keep one kind"
    ):
        mask_of(found, found.splits["train"][1])


def test_one_mask_of_labelids_among_labeltrainids_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layouts, "_SAMPLED_MASKS", 2)  # so that the sample misses it
    raw = trees.cityscapes(tmp_path, kinds=("labelTrainIds",))
    stray = raw / f"gtFine/train/aachen/{city_id('aachen', 1)}_gtFine_labelTrainIds.png"
    save(stray, trees.patches("stray", trees.CITY_IDS))
    found = layouts.cityscapes(raw)
    assert found.notes == ("masks hold labelTrainIds",)
    with pytest.raises(DataError, match=r"also holds .*; the masks must be labelTrainIds of Cityscapes, as the others"):
        mask_of(found, found.splits["train"][1])


def test_cityscapes_needs_both_archives(tmp_path: Path) -> None:
    raw = trees.cityscapes(tmp_path / "raw")
    shutil.rmtree(raw / "gtFine")
    with pytest.raises(DataError, match=r"raw: must hold gtFine/train/.* unpack gtFine_trainvaltest.zip"):
        layouts.cityscapes(raw)


def test_a_cityscapes_image_without_its_mask_is_found(tmp_path: Path) -> None:
    raw = trees.cityscapes(tmp_path)
    next(raw.glob("gtFine/val/munster/*_labelIds.png")).unlink()
    (finding,) = layouts.cityscapes(raw).findings
    assert finding.where.endswith("leftImg8bit/val/munster/munster_000000_000000_leftImg8bit.png")


# ------------------------------------------------------------------------------------------------------ PASCAL VOC

AUG = sorted({*trees.VOC_TRAIN, *trees.SBD_TRAIN, *trees.SBD_VAL} - {*trees.VOC_VAL})


def test_voc_and_sbd_are_merged_the_standard_way(tmp_path: Path) -> None:
    """train_aug = (VOC train + SBD train + SBD val) - VOC val, and VOC's own mask where both have one."""
    found = layouts.voc(trees.voc(tmp_path / "voc"), sbd=trees.sbd(tmp_path / "sbd"), published=True)
    assert ids(found, "train") == labeled(found, "train") == AUG
    assert ids(found, "val") == sorted(trees.VOC_VAL)
    assert len(AUG) == len(trees.VOC_TRAIN) + 3
    assert found.notes == ("3 training masks come from SBD",)
    assert found.findings == ()
    for split, sources in found.splits.items():
        for source in sources:
            own = source.id in trees.VOC_TRAIN or split == "val"
            wanted = trees.voc_mask(source.id) if own else trees.sbd_mask(source.id)
            assert mask_of(found, source) == wanted.tolist(), source.id
            assert (255 in np.unique(wanted)) == own, "SBD draws no border"


def test_voc_alone(tmp_path: Path) -> None:
    found = layouts.voc(trees.voc(tmp_path), published=True)
    assert ids(found, "train") == sorted(trees.VOC_TRAIN), "a list without a newline at its end is read whole"
    assert found.notes == ("no SBD: only VOC's own masks",)


def test_vocs_val_set_is_the_test_set_that_no_search_sees(tmp_path: Path) -> None:
    found = layouts.voc(trees.voc(tmp_path / "voc"), sbd=trees.sbd(tmp_path / "sbd"))
    assert ids(found, "test") == sorted(trees.VOC_VAL)
    assert ids(found, "val") == sorted(trees.VOC_TRAIN)[::7], "clean masks of VOC's own"
    assert sorted([*ids(found, "train"), *ids(found, "val")]) == AUG


def test_sbd_as_others_pack_it(tmp_path: Path) -> None:
    """SegmentationClassAug holds grey PNGs, also those of VOC's val set."""
    raw = trees.voc(tmp_path)
    for key in (*AUG, *trees.VOC_VAL):
        save(raw / f"VOCdevkit/VOC2012/SegmentationClassAug/{key}.png", trees.sbd_mask(key))
    found = layouts.voc(raw, published=True)
    assert ids(found, "train") == AUG
    assert {source.id: Path(source.mask or "").parent.name for source in found.splits["train"]} == {
        key: "SegmentationClass" if key in trees.VOC_TRAIN else "SegmentationClassAug" for key in AUG
    }


def test_images_that_only_sbd_has_are_taken_from_there(tmp_path: Path) -> None:
    raw, sbd = trees.voc(tmp_path / "voc"), trees.sbd(tmp_path / "sbd")
    (raw / "VOCdevkit/VOC2012/JPEGImages/2008_000002.jpg").unlink()
    found = layouts.voc(raw, sbd=sbd, published=True)
    image = {source.id: source.image for source in found.splits["train"]}
    assert image["2008_000002"].endswith("benchmark_RELEASE/dataset/img/2008_000002.jpg")
    assert image["2008_000008"].endswith("JPEGImages/2008_000008.jpg")


@pytest.mark.parametrize("below", ["", "VOCdevkit", "VOCdevkit/VOC2012"])
def test_raw_may_be_any_folder_of_the_archive(tmp_path: Path, below: str) -> None:
    assert ids(layouts.voc(trees.voc(tmp_path) / below, published=True), "val") == sorted(trees.VOC_VAL)


def test_files_that_voc_lists_but_lacks_are_found(tmp_path: Path) -> None:
    raw, sbd = trees.voc(tmp_path / "voc"), trees.sbd(tmp_path / "sbd")
    (sbd / "benchmark_RELEASE/dataset/cls/2008_000023.mat").unlink()
    (raw / "VOCdevkit/VOC2012/JPEGImages/2007_000032.jpg").unlink()
    findings = layouts.voc(raw, sbd=sbd, published=True).findings
    assert [finding.line.partition("must have image and mask, but ")[2] for finding in findings] == [
        "JPEGImages/2007_000032.jpg is missing; get the archives again.",
        f"{sbd}/benchmark_RELEASE/dataset/cls/2008_000023.mat is missing; get the archives again.",
    ]


@pytest.mark.parametrize(("voc", "message"), [("nope", "VOCtrainval_11-May-2012.tar"), ("voc", "benchmark.tgz")])
def test_wrong_folders_name_the_archive(tmp_path: Path, voc: str, message: str) -> None:
    trees.voc(tmp_path / "voc")
    with pytest.raises(DataError, match=f"must hold .* unpack {message} here"):
        layouts.voc(tmp_path / voc, sbd=tmp_path / "nope")


@pytest.mark.skipif(
    not {"VOC_ROOT", "SBD_ROOT"} <= {*os.environ}, reason="VOC_ROOT and SBD_ROOT, the raw data, are not set"
)
def test_real_voc_and_sbd() -> None:
    found = layouts.voc(Path(os.environ["VOC_ROOT"]), sbd=Path(os.environ["SBD_ROOT"]), published=True)
    assert {name: len(sources) for name, sources in found.splits.items()} == {"train": 10582, "val": 1449}
    assert found.notes == ("9118 training masks come from SBD",)
    assert found.findings == ()


@pytest.mark.skipif("CITYSCAPES_DATASET" not in os.environ, reason="CITYSCAPES_DATASET, the raw data, is not set")
def test_real_cityscapes() -> None:
    found = layouts.cityscapes(Path(os.environ["CITYSCAPES_DATASET"]), published=True)
    assert {name: len(sources) for name, sources in found.splits.items()} == {"train": 2975, "val": 500}
