"""Patterns: which files they find, and which ids these have."""

import os
import unicodedata
from pathlib import Path

import pytest

from cps_ray.datasets.prepare.patterns import Pattern
from cps_ray.errors import DataError


def touch(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"")
    return root


def names(raw: Path, pattern: str) -> list[str]:
    return [file.path.relative_to(raw).as_posix() for file in Pattern(pattern).find(raw)]


@pytest.mark.parametrize(
    ("pattern", "path", "found"),
    [
        ("images/*", "images/a.b.png", "a.b"),
        ("images/**/*.png", "images/x/y/a.png", "a"),
        ("images/{id}_rgb.*", "images/a_1_rgb.tif", "a_1"),
        ("images/{id}_rgb.*", "images/a_1.tif", None),
        ("images/{id}.png", "images/drive_a/00000.png", "drive_a/00000"),
        ("images/{id}_rgb.png", "images/drive_a/0_rgb.png", "drive_a/0"),
        ("**/{id}_leftImg8bit.png", "train/bonn/b_0_leftImg8bit.png", "b_0"),
        ("{id}/image.png", "scene 7/image.png", "scene 7"),
        ("{id}/{id}_mask.png", "a/a_mask.png", "a"),
        ("{id}/{id}_mask.png", "a/b_mask.png", None),
        ("*/{id}.png", "x/a.png", "a"),
        ("s[0-3]/{id}_?.png", "s2/a_7.png", "a"),
        ("s[!0-3]/{id}.png", "s2/a.png", None),
        ("s[!0-3]*.png", "s/a.png", None),
        ("[a&&b|\\w~~]*.png", "w.png", "w"),
        ("a(b)+/{id}.png", "a(b)+/c.png", "c"),
        ("./images/*.png", "images/a.png", "a"),
        ("images/*.png", "images/a.png.bak", None),
        ("images/*.png", "images/x/a.png", None),
        ("set [v2]/*.png", "set [v2]/a.png", "a"),
        ("*.jpg", "a.JPG", "a"),
        ("*.jpg", "a.jpeg", "a"),
        ("*.JPEG", "a.jpg", "a"),
        ("{id}_im.tif", "a_im.TIFF", "a"),
        ("*.tiff", "a.tif", "a"),
        ("*.p[np]g", "a.PNG", "a"),
        ("*.png", "a.jpg", None),
        ("IMG_*.jpg", "img_1.jpg", None),  # case counts in names
        ("caf\u00e9/*.png", "cafe\u0301/a\u0301.png", "\u00e1"),
    ],
)
def test_the_id_in_a_path(pattern: str, path: str, found: str | None) -> None:
    ids = Pattern(pattern).ids(path)
    assert (ids and ids[0]) == found


@pytest.mark.parametrize(
    ("pattern", "path", "found"),
    [
        ("images/*/*.png", "images/drive_a/00000.png", "drive_a/00000"),
        ("images/**/*.png", "images/x/y/a.png", "x/y/a"),
        ("images/**/*.png", "images/a.png", "a"),
        ("a/**", "a/b/c.png", "b/c"),
        ("scenes/*/image.png", "scenes/scene 1/image.png", "scene 1"),
        ("run_?/left/*.*", "run_1/left/7.jpg", "run_1/7"),
        ("images/*.png", "images/a.b.png", "a.b"),
        ("images/a.png", "images/a.png", "a"),
        ("*/{id}.png", "x/a.png", "a"),
    ],
)
def test_the_long_id_holds_what_wildcards_match(pattern: str, path: str, found: str) -> None:
    ids = Pattern(pattern).ids(path)
    assert ids is not None
    assert ids[1] == found


@pytest.mark.parametrize("pattern", ["**/*.png", "{id}.png"])
def test_hidden_files_and_those_of_systems_are_left_out(tmp_path: Path, pattern: str) -> None:
    folders = (".ipynb_checkpoints", "@eaDir", "__MACOSX", "#recycle", "$RECYCLE.BIN", "lost+found", ".cache")
    touch(tmp_path, "deep/b.png", "a.png", "._a.png", ".x.png", *(f"deep/{folder}/c.png" for folder in folders))
    assert names(tmp_path, pattern) == ["a.png", "deep/b.png"]
    touch(tmp_path, "Thumbs.db", "desktop.ini", "THUMBS.DB", ".DS_Store")
    assert names(tmp_path, "*") == ["a.png"]


def test_a_hidden_folder_that_is_named_is_meant(tmp_path: Path) -> None:
    touch(tmp_path, ".data/@eaDir/a.png", ".data/.b.png")
    assert names(tmp_path, ".data/@eaDir/*") == [".data/@eaDir/a.png"]
    assert names(tmp_path, ".data/*") == []


@pytest.mark.parametrize("name", ["set [v2]", "50%", "what?", "a*b", "#1", "two words", "{id}", "(x)+", "ws%2Fx"])
def test_any_name_of_the_raw_folder(tmp_path: Path, name: str) -> None:
    raw = touch(tmp_path / name, "images/b.png", "images/a.png")
    touch(tmp_path, "set v/images/c.png", "50/images/c.png")
    assert names(raw, "images/*.png") == ["images/a.png", "images/b.png"]


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_names_are_compared_in_one_form_and_paths_stay(tmp_path: Path, form: str) -> None:
    on_disk = unicodedata.normalize(form, "\u00fcber/\u00e9.png")
    touch(tmp_path, on_disk)
    (file,) = Pattern("\u00fcber/*.png").find(tmp_path)
    assert (file.id, file.path) == ("\u00e9", tmp_path / on_disk)
    assert Pattern(unicodedata.normalize("NFD", "\u00fcber/*.png")).find(tmp_path) == [file]


def test_links_to_folders_are_followed_once_round(tmp_path: Path) -> None:
    touch(tmp_path, "disk/x/a.png")
    raw = touch(tmp_path / "raw", "b.png")
    (raw / "linked").symlink_to(tmp_path / "disk")
    (tmp_path / "disk/x/back").symlink_to(raw)
    (raw / "self").symlink_to("self")
    (raw / "gone.png").symlink_to("nowhere.png")
    os.mkfifo(raw / "pipe.png")
    assert names(raw, "**/*.png") == ["b.png", "gone.png", "linked/x/a.png"]
    assert names(raw, "*/x/{id}.png")[0] == "linked/x/a.png"


def test_a_folder_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path, "images/a.png")
    scan = os.scandir

    def refuse(path: Path) -> object:
        if path.name == "images":
            raise PermissionError(13, "Permission denied")
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(
        DataError, match=r"images: the folder cannot be read \(Permission denied\); fix its permissions"
    ):
        Pattern("images/*").find(tmp_path)


@pytest.mark.parametrize(
    ("name", "found"),
    [
        (b"a\nb.png", "has a line break"),
        (b" .png", "nothing that can be seen"),
        (b"caf\xe9.png", r"caf\\\\xe9.png.*is not UTF-8"),
    ],
)
def test_names_that_no_list_can_hold_are_refused(tmp_path: Path, name: bytes, found: str) -> None:
    path = os.path.join(os.fsencode(tmp_path), name)
    open(path, "wb").close()
    with pytest.raises(DataError, match=f"{found}.*; rename it") as caught:
        Pattern("*.png").find(tmp_path)
    assert "\n" not in str(caught.value)
    os.rename(path, os.path.join(os.fsencode(tmp_path), b"good.png"))
    assert names(tmp_path, "*.png") == ["good.png"]
