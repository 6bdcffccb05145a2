"""Splits drawn from one folder: seeded, whole groups, every class where it can be, and what was drawn stays."""

import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from trees import save, scene

from cps_ray.datasets.prepare import layouts, splits
from cps_ray.datasets.prepare.assembly import BadDataError, DataSetPlan, write_shards
from cps_ray.datasets.prepare.items import FromFiles, MaskFile, Source
from cps_ray.datasets.prepare.layouts import RawData
from cps_ray.datasets.prepare.recipe import Recipe
from cps_ray.datasets.prepare.splits import list_folder
from cps_ray.errors import DataError

TRAIN = {"images": "*.jpg", "masks": "*.png", "unlabeled": "rest"}


def recipe(**settings: Any) -> Recipe:
    drawn = settings.pop("splits", {"val": 0.2, "test": 0.2})
    classes = [{"name": name} for name in ("soil", "crop", "weed")]
    train = TRAIN | settings.pop("train", {})
    return Recipe.model_validate({"classes": classes, "splits": {"train": train, **drawn}} | settings)


def photo(raw: Path, key: str, values: Iterable[int] | None = (0, 1), same_as: str | None = None) -> None:
    """Writes a photo and, with `values`, its mask; or a copy of the photo `same_as`."""
    save(raw / f"{key}.jpg", scene(same_as or key, (8, 8)))
    if values is not None:
        save(raw / f"{key}.png", np.resize(np.array([*values], np.uint8), (8, 8)))


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """24 photos with masks, three of each of eight videos; four show weed. And one without mask of each video."""
    for number in range(24):
        photo(tmp_path / "raw", f"v{number // 3}_{number:02}", (0, 1, 2) if number % 6 == 0 else (0, 1))
    for number in range(24, 32):
        photo(tmp_path / "raw", f"v{number - 24}_{number:02}", None)
    return tmp_path / "raw"


def drawn(data: RawData) -> dict[str, set[str]]:
    """Returns the ids of the labelled images of each split."""
    return {name: {source.id for source in sources if source.masks} for name, sources in data.splits.items()}


def lists(folder: Path) -> dict[str, set[str]]:
    return {path.stem: {*path.read_text().splitlines()} for path in folder.glob("*.txt")}


def test_fractions_of_one_folder(raw: Path, tmp_path: Path) -> None:
    folder = list_folder(tmp_path / "mine.yaml")
    data = layouts.folder(raw, recipe(), folder)
    found = drawn(data)
    assert folder == tmp_path / "mine.splits"
    assert {name: len(ids) for name, ids in found.items()} == {"train": 14, "val": 5, "test": 5}
    assert len(set().union(*found.values())) == 24
    assert len(data.splits["train"]) == 22, "unlabelled images are in train"
    weed = {f"v{number // 3}_{number:02}" for number in range(0, 24, 6)}
    assert all(weed & ids for ids in found.values()), "every split shows the rare class"
    assert lists(folder) == found
    assert data.notes[-1] == "labelled images were drawn for splits, as mine.splits lists: test 5, train 14, val 5"
    assert data.findings == ()


def test_a_draw_is_seeded(raw: Path) -> None:
    first = drawn(layouts.folder(raw, recipe()))
    assert drawn(layouts.folder(raw, recipe())) == first
    assert drawn(layouts.folder(raw, recipe(draw_seed=1))) != first


def test_groups_stay_whole_and_take_their_unlabelled_images_out_of_train(raw: Path) -> None:
    data = layouts.folder(raw, recipe(group_by=r"^(\w+)_\d+"))
    videos = {name: {key[:2] for key in ids} for name, ids in drawn(data).items()}
    assert {name: len(found) for name, found in videos.items()} == {"train": 4, "val": 2, "test": 2}
    assert len(set().union(*videos.values())) == 8
    unlabeled = {source.id[:2] for source in data.splits["train"] if not source.masks}
    assert unlabeled == videos["train"]
    assert "4 unlabelled images are left out of train, as images of their group" in data.notes[-1]


def test_a_photo_with_a_mask_that_cannot_be_used_stays_with_its_group(raw: Path) -> None:
    for number in range(1, 24, 3):  # one of each video
        (raw / f"v{number // 3}_{number:02}.png").write_bytes(b"no mask")
    found = layouts.folder(raw, recipe(group_by=r"^v\d")).splits
    videos = {name: {source.id[:2] for source in sources} for name, sources in found.items()}
    assert not videos["train"] & (videos["val"] | videos["test"])


@pytest.mark.parametrize("pattern", [r"^v\d", r"(v\d)_", r"^(v\d)_(\d)", r"^(x)?v\d"])
def test_a_group_is_the_first_group_of_the_expression_or_its_match(raw: Path, pattern: str) -> None:
    data = layouts.folder(raw, recipe(group_by=pattern))
    videos = [{key[:2] for key in ids} for ids in drawn(data).values()]
    assert sum(map(len, videos)) == 8


def test_an_id_without_group_is_its_own_and_a_prefix_is_no_part_of_it(raw: Path) -> None:
    photo(raw, "single")
    data = layouts.folder(raw, recipe(group_by=r"^v\d", train={"prefix": "own_"}))
    assert "own_single" in set().union(*drawn(data).values())
    with pytest.raises(DataError, match=r"group_by '\^x' must match ids, but matches none; they look like 'single'"):
        layouts.folder(raw, recipe(group_by="^x", train={"prefix": "own_"}))


def test_copies_of_a_photo_stay_on_one_side(raw: Path) -> None:
    for number in range(12):
        photo(raw, f"copy_{number:02}", (0, 1) if number % 2 else None, same_as=f"v{number // 3}_{number:02}")
    data = layouts.folder(raw, recipe())
    found = {source.id: name for name, sources in data.splits.items() for source in sources}
    for number in range(12):
        own, copy = f"v{number // 3}_{number:02}", f"copy_{number:02}"
        assert found.get(copy, "left out") == (found[own] if number % 2 or found[own] == "train" else "left out")
    assert "left out" in {found.get(f"copy_{number:02}", "left out") for number in range(12)}


# ------------------------------------------------------------------------------------------------- drawn once, kept


def test_what_was_drawn_stays_when_masks_are_added(raw: Path, tmp_path: Path) -> None:
    folder = tmp_path / "mine.splits"
    before = drawn(layouts.folder(raw, recipe(), folder))
    for number in range(24, 32):
        save(raw / f"v{number - 24}_{number:02}.png", np.resize(np.uint8([0, 1]), (8, 8)))
    for number in range(30, 40):
        photo(raw, f"w_{number}")
    data = layouts.folder(raw, recipe(), folder)
    after = drawn(data)
    assert all(before[name] <= after[name] for name in before)
    assert {name: len(ids) for name, ids in after.items()} == {"train": 26, "val": 8, "test": 8}
    assert lists(folder) == after
    assert data.notes[-1].endswith("test 8, train 26, val 8; 18 of them are new")
    assert drawn(layouts.folder(raw, recipe(), folder)) == after


def test_a_new_image_joins_its_group_and_its_copy(raw: Path, tmp_path: Path) -> None:
    folder = tmp_path / "mine.splits"
    before = drawn(layouts.folder(raw, recipe(group_by=r"^v\d"), folder))
    in_test, in_val = min(before["test"]), min(before["val"])
    photo(raw, f"{in_test[:2]}_new")
    photo(raw, "renamed", same_as=in_val)
    photo(raw, f"{in_test[:2]}_bare", None)
    data = layouts.folder(raw, recipe(group_by=r"^v\d"), folder)
    assert drawn(data)["test"] - before["test"] == {f"{in_test[:2]}_new"}
    assert drawn(data)["val"] - before["val"] == {"renamed"}
    assert not any(source.id == f"{in_test[:2]}_bare" for source in data.splits["train"])


def test_lists_win_over_other_settings_until_they_are_deleted(raw: Path, tmp_path: Path) -> None:
    folder = tmp_path / "mine.splits"
    before = drawn(layouts.folder(raw, recipe(), folder))
    other = recipe(splits={"val": 0.4, "test": 0.2}, draw_seed=5)
    data = layouts.folder(raw, other, folder)
    assert drawn(data) == before
    assert "the splits were drawn with draw_seed: 0, val: 0.2, test: 0.2; what is listed stays" in data.notes[-1]
    assert data.notes[-1].endswith(f"To draw all anew, delete {folder}")
    shutil.rmtree(folder)
    assert len(drawn(layouts.folder(raw, other, folder))["val"]) == 10


def test_groups_that_were_torn_before_are_noted(raw: Path, tmp_path: Path) -> None:
    folder = tmp_path / "mine.splits"
    layouts.folder(raw, recipe(), folder)
    data = layouts.folder(raw, recipe(group_by=r"^v\d"), folder)
    assert any("groups are in several splits, as they were drawn before `group_by`" in note for note in data.notes)
    torn = next(iter({key[:2] for key in lists(folder)["train"]} & {key[:2] for key in lists(folder)["test"]}))
    photo(raw, f"{torn}_new")
    assert f"{torn}_new" in drawn(layouts.folder(raw, recipe(group_by=r"^v\d"), folder))["test"]


@pytest.mark.parametrize("what", ["png", "jpg"])
def test_files_that_vanished_are_named_with_the_way_out(raw: Path, tmp_path: Path, what: str) -> None:
    folder = tmp_path / "mine.splits"
    layouts.folder(raw, recipe(), folder)
    path = folder / "test.txt"
    gone, *rest = path.read_text().splitlines()
    for suffix in {"png", what}:
        (raw / f"{gone}.{suffix}").unlink()
    with pytest.raises(
        DataError, match=rf"test.txt:1: '{gone}' is no image of .* Bring back the image or its mask, or take its line"
    ):
        layouts.folder(raw, recipe(), folder)
    path.write_text("\n".join(rest))
    assert drawn(layouts.folder(raw, recipe(), folder))["test"] == {*rest}


def test_a_split_that_is_no_longer_drawn_keeps_its_images_from_train(raw: Path, tmp_path: Path) -> None:
    folder = tmp_path / "mine.splits"
    before = drawn(layouts.folder(raw, recipe(), folder))
    with pytest.raises(
        DataError, match=r"test.txt: .* bring back `test: FRACTION`, or delete .*mine.splits to draw all splits anew"
    ):
        layouts.folder(raw, recipe(splits={"val": 0.2}), folder)
    assert drawn(layouts.folder(raw, recipe(), folder)) == before
    shutil.rmtree(folder)
    assert len(drawn(layouts.folder(raw, recipe(splits={"val": 0.2}), folder))["val"]) == 5


def test_an_image_in_two_lists_is_named(raw: Path, tmp_path: Path) -> None:
    folder = tmp_path / "mine.splits"
    layouts.folder(raw, recipe(), folder)
    stray = (folder / "test.txt").read_text().splitlines()[0]
    with (folder / "val.txt").open("a") as file:
        file.write(f"{stray}\n")
    with pytest.raises(DataError, match=rf"val.txt:6: '{stray}' is in .*test.txt, too; take it out of one"):
        layouts.folder(raw, recipe(), folder)


def test_a_draw_that_was_stopped_while_it_wrote_keeps_what_is_held_out(
    raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "mine.splits"
    write = splits.write_list

    def stop(path: Path, ids: Iterable[str]) -> None:
        if path.stem == "val":
            raise KeyboardInterrupt
        write(path, ids)

    monkeypatch.setattr(splits, "write_list", stop)
    with pytest.raises(KeyboardInterrupt):
        layouts.folder(raw, recipe(), folder)
    monkeypatch.undo()
    held_out = lists(folder)["test"]
    found = drawn(layouts.folder(raw, recipe(), folder))
    assert found["test"] == held_out
    assert {name: len(ids) for name, ids in found.items()} == {"train": 14, "val": 5, "test": 5}


def test_a_folder_that_cannot_be_written_is_named(raw: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.splits").write_text("a file")
    with pytest.raises(
        DataError, match=r"mine.splits: the lists of what was drawn cannot be written \(.*\); move the recipe"
    ):
        layouts.folder(raw, recipe(), tmp_path / "mine.splits")
    assert drawn(layouts.folder(raw, recipe(), tmp_path / "other/mine.splits")) == lists(tmp_path / "other/mine.splits")


def test_names_of_any_kind_are_kept(tmp_path: Path) -> None:
    odd = ["photo 1", "photo", " a", "a", "tab\there", "#1", "50%", "set [v2]", "m\u00fcnchen", "v1.2", "v1"]
    for key in odd:
        photo(tmp_path / "raw", key)
    folder = tmp_path / "mine.splits"
    before = drawn(layouts.folder(tmp_path / "raw", recipe(), folder))
    assert drawn(layouts.folder(tmp_path / "raw", recipe(), folder)) == before
    assert set().union(*before.values()) == {*odd}


def test_ids_that_become_paths_are_still_those_that_were_drawn(tmp_path: Path) -> None:
    raw, train = tmp_path / "raw", {"images": "**/*.jpg", "masks": "**/*.png"}
    for number in range(10):
        photo(raw, f"day_1/{number}")
    folder = tmp_path / "mine.splits"
    before = drawn(layouts.folder(raw, recipe(train=train), folder))
    assert "day_1/0" not in set().union(*before.values())
    photo(raw, "day_2/10")
    save(raw / "day_2/10.jpeg", scene("10", (8, 8)))
    (raw / "day_2/10.jpeg").rename(raw / "day_2/11.jpg")
    photo(raw, "day_3/11", None)
    after = drawn(layouts.folder(raw, recipe(train=train), folder))
    assert all({f"day_1/{key}" for key in ids} <= after[name] for name, ids in before.items())


# ------------------------------------------------------------------------------------------------------ what cannot be


@pytest.mark.parametrize(
    ("count", "fractions", "message", "more", "enough"),
    [
        (2, {"val": 0.1}, "splits.val: 0.1 of 2 labelled images is none; label more images", 10, {"val": 0.1}),
        (4, {"val": 0.1}, "splits.val: 0.1 of 4 labelled images is none; write at least 0.25, or label", 4, {"val": 0.25}),
        (3, {"val": 0.1}, "write at least 0.34", 3, {"val": 0.34}),
        (
            2,
            {"val": 0.4, "test": 0.4},
            "splits.test: 2 labelled images are too few for train, val, test, which leave none for test; label more images",
            3,
            {"val": 0.4, "test": 0.4},
        ),
    ],
)  # fmt: skip
def test_too_few_masks(
    tmp_path: Path, count: int, fractions: dict[str, float], message: str, more: int, enough: dict[str, float]
) -> None:
    for number in range(count):
        photo(tmp_path / "raw", f"{number}")
    with pytest.raises(DataError, match=message):
        layouts.folder(tmp_path / "raw", recipe(splits=fractions), tmp_path / "x.splits")
    assert not (tmp_path / "x.splits").exists()
    for number in range(more):
        photo(tmp_path / "raw", f"{number}")
    found = drawn(layouts.folder(tmp_path / "raw", recipe(splits=enough), tmp_path / "x.splits"))
    assert all(found.values())


def test_too_few_groups(raw: Path) -> None:
    message = r"24 labelled images in 1 groups are too few for train, val, test, .*; label more images, or group fewer together"
    with pytest.raises(DataError, match=message):
        layouts.folder(raw, recipe(group_by="^(v)"))
    assert all(drawn(layouts.folder(raw, recipe(group_by=r"^(v\d)"))).values())


def test_masks_that_cannot_be_used_are_not_drawn(raw: Path, tmp_path: Path) -> None:
    (raw / "v0_00.png").write_bytes(b"no mask")
    folder = tmp_path / "mine.splits"
    data = layouts.folder(raw, recipe(), folder)
    assert any(source.id == "v0_00" for source in data.splits["train"]), "where prepare will report it"
    assert "v0_00" not in set().union(*lists(folder).values())


def test_where_most_masks_cannot_be_used_that_is_said_and_nothing_is_drawn(raw: Path, tmp_path: Path) -> None:
    for number in range(24):
        photo(raw, f"v{number // 3}_{number:02}", (0, 7))
    data = layouts.folder(raw, recipe(), tmp_path / "mine.splits")
    assert {name: len(sources) for name, sources in data.splits.items()} == {"train": 32, "val": 0, "test": 0}
    assert not (tmp_path / "mine.splits").exists()
    plan = DataSetPlan(data.splits, FromFiles(data.reader), data.classes, data.palette, "a test")
    with pytest.raises(BadDataError) as caught:
        write_shards(tmp_path / "out", plan)
    assert "mask values must be in the class table, but this one also holds 7" in caught.value.findings[0].line


def test_masks_are_read_only_when_there_are_new_ones(raw: Path) -> None:
    counts = []

    def classes_of(source: Source) -> NDArray[np.bool_]:
        counts.append(source.id)
        return np.array([True, True, False])

    sources = layouts.folder(raw, recipe()).splits
    every = tuple(sorted((*sources["train"], *sources["val"], *sources["test"]), key=lambda source: source.id))
    for expected in (24, 24):
        splits.draw_splits({"train": every}, recipe(), raw / "x.splits", classes_of)
        assert len(counts) == expected


# --------------------------------------------------------------------------------------------------- properties


def table(seed: int) -> tuple[dict[str, NDArray[np.bool_]], list[str]]:
    """Returns which classes each of some images shows, and the video of each."""
    rng = np.random.default_rng(seed)
    count, classes = int(rng.integers(12, 80)), int(rng.integers(2, 9))
    shows = rng.random((count, classes)) < 0.8 * 0.6 ** np.arange(classes)
    videos = rng.integers(0, count // 2, count)
    keys = [f"{video:02}_{number:02}" for number, video in enumerate(videos)]
    return dict(zip(keys, shows, strict=True)), keys


def draw(shows: Mapping[str, NDArray[np.bool_]], folder: Path, **settings: Any) -> dict[str, set[str]]:
    folder.mkdir(exist_ok=True)
    for key in shows:
        (folder / f"{key}.jpg").write_text(key)
    sources = [Source(key, str(folder / f"{key}.jpg"), (MaskFile(key),)) for key in sorted(shows)]
    found, _ = splits.draw_splits({"train": sources}, recipe(**settings), None, lambda source: shows[source.id])
    return {name: {source.id for source in found[name]} for name in found}


@pytest.mark.parametrize("seed", range(40))
def test_every_class_is_everywhere_where_it_can_be(tmp_path: Path, seed: int) -> None:
    shows, _ = table(seed)
    found = draw(shows, tmp_path / "files", splits={"val": 0.25, "test": 0.25}, draw_seed=seed)
    count = len(shows)
    assert {len(found["val"]), len(found["test"])} == {round(0.25 * count)}
    images = np.sum(list(shows.values()), axis=0)
    in_split = {name: np.any([shows[key] for key in ids], axis=0) for name, ids in found.items()}
    for class_id, number in enumerate(images):
        assert in_split["train"][class_id] == (number > 0), "a class that one image shows is learnt"
        if number >= 5:
            assert all(seen[class_id] for seen in in_split.values())


@pytest.mark.parametrize("seed", range(40))
def test_groups_stay_whole_and_sizes_are_near(tmp_path: Path, seed: int) -> None:
    shows, keys = table(seed)
    found = draw(shows, tmp_path / "files", group_by=r"^\d+", draw_seed=seed)
    videos = [{key[:2] for key in ids} for ids in found.values()]
    assert sum(map(len, videos)) == len(set().union(*videos))
    largest = max(sum(key[:2] == video for key in keys) for video in {key[:2] for key in keys})
    for name in ("val", "test"):
        assert abs(len(found[name]) - 0.2 * len(keys)) <= largest


def test_what_splits_were_drawn_with_is_kept_beside_them(raw: Path, tmp_path: Path) -> None:
    layouts.folder(raw, recipe(group_by=r"^v\d"), tmp_path / "x.splits")
    kept = json.loads((tmp_path / "x.splits/drawn.json").read_text())
    assert kept == {"draw_seed": 0, "group_by": r"^v\d", "val": 0.2, "test": 0.2}
