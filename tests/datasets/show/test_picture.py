"""Overlays in the legend's colours; sheets that show every class and cut nothing off."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest
from fonts import write_font
from numpy.typing import NDArray
from PIL import Image, ImageFont

from cps_ray.datasets.images import encode_image, encode_mask
from cps_ray.datasets.shards import ImageLocations, Index, sha256
from cps_ray.datasets.show import picture
from cps_ray.datasets.show.picture import (
    NUM_EXAMPLES,
    PaletteColor,
    Thumbnail,
    _font,
    choose_examples,
    class_label,
    contact_sheet,
    image_label,
    paint_mask,
    paint_swatch,
    shorten_text,
    thumbnails,
)
from cps_ray.engine.batch import IGNORE

PALETTE: tuple[PaletteColor, ...] = ((200, 0, 0), (0, 0, 200), (10, 90, 10))
MANY: tuple[PaletteColor, ...] = tuple((7 + k, 250 - k, (37 * k) % 256) for k in range(150))


def unknown(count: int) -> list[np.ndarray]:
    """Checksums of pixels and train ids that nothing here looks at."""
    return [np.zeros((count, 32), np.uint8)] * 2


def index_of(pixels: NDArray[np.int64], masked: NDArray[np.bool_] | None = None) -> Index:
    """Returns an index of images of 100x100 px with these pixels (N, C) per class; there is no file to read."""
    count = len(pixels)
    masked = np.ones(count, np.bool_) if masked is None else masked
    zeros, image = np.zeros(count, np.int32), np.zeros((count, 2), np.int64)
    mask = image + masked[:, None]
    checksum = np.zeros((count, 32), np.uint8)
    ids = tuple(f"{k:04d}" for k in range(count))
    side = zeros + 100
    locations = ImageLocations(("f",), ids, zeros, image, checksum, mask, checksum)
    return Index(locations, side, side, pixels * masked[:, None], np.zeros(count, np.uint64), *unknown(count))


def stored(tmp_path: Path, images: list[tuple[NDArray[np.uint8], NDArray[np.uint8] | None]]) -> Index:
    """Writes images and masks into one file and returns their index."""
    data, image_spans, mask_spans = b"", [], []
    for image, mask in images:
        pair = ((encode_image(image), image_spans), (b"" if mask is None else encode_mask(mask), mask_spans))
        for encoded, spans in pair:
            spans.append((len(data), len(encoded), sha256(encoded)))
            data += encoded
    (tmp_path / "f").write_bytes(data)
    image_at, mask_at = (np.array([span[:2] for span in spans], np.int64) for spans in (image_spans, mask_spans))
    image_sha256, mask_sha256 = (
        np.stack([np.frombuffer(span[2], np.uint8) for span in spans]) for spans in (image_spans, mask_spans)
    )
    zeros = np.zeros(len(images), np.int32)
    ids = tuple(f"image {k}" for k in range(len(images)))
    locations = ImageLocations((str(tmp_path / "f"),), ids, zeros, image_at, image_sha256, mask_at, mask_sha256)
    height, width = (np.array([image.shape[axis] for image, _ in images], np.int32) for axis in (0, 1))
    pixels, hashes = np.zeros((len(images), 3), np.int64), np.zeros(len(images), np.uint64)
    return Index(locations, height, width, pixels, hashes, *unknown(len(images)))


def test_masks_are_painted_in_the_palette_and_ignored_pixels_are_hatched() -> None:
    mask = np.repeat(np.array([0, 1, 2, IGNORE], np.uint8), 16)[None].repeat(16, axis=0)
    colors = paint_mask(mask, PALETTE)
    for label, color in enumerate(PALETTE):
        assert (colors[:, 16 * label : 16 * label + 16] == color).all()
    hatched = colors[:, 48:].reshape(-1, 3)
    assert len(np.unique(hatched, axis=0)) == 2
    assert (hatched == hatched[:, :1]).all()  # grey, whatever the palette


def test_an_overlay_keeps_the_hue_and_lets_the_image_through() -> None:
    image = np.zeros((16, 16, 3), np.uint8)
    image[:8] = 255
    over = paint_mask(np.zeros((16, 16), np.uint8), PALETTE, image).astype(int)
    assert (over[0, 0] - over[15, 0] == over[0, 0, 1]).all()  # grey is added, to all channels alike
    assert 30 < over[0, 0, 1] < 80
    assert over[15, 0].tolist() == pytest.approx([156, 0, 0])
    hatched = paint_mask(np.full((16, 16), IGNORE, np.uint8), PALETTE, image)
    assert hatched[:8].mean() > hatched[8:].mean() + 30


def test_every_class_is_shown_and_rare_ones_where_they_are_large() -> None:
    rng = np.random.default_rng(0)
    pixels = np.zeros((300, 40), np.int64)
    pixels[:, 0] = 8000
    for label in range(1, 40):  # each in very few images, and in one of them large
        images = rng.choice(300, 3, replace=False)
        pixels[images, label] = (10, 20, 1500)
    index = index_of(pixels)
    rows = choose_examples(index, np.arange(300), seed=0)
    assert (pixels[rows].max(axis=0) >= 1500).all()
    assert len(set(rows.tolist())) == len(rows) > NUM_EXAMPLES
    with_unmasked = index_of(np.vstack([pixels, pixels[:5]]), np.arange(305) < 300)
    assert (
        with_unmasked.labeled[choose_examples(with_unmasked, np.arange(305), seed=0)].tolist()
        == [True] * len(rows) + [False] * 4
    )


def test_examples_are_drawn_from_the_rows_given_and_show_images_without_masks_too() -> None:
    index = index_of(np.full((60, 2), 5000, np.int64), np.arange(60) < 30)
    rows = choose_examples(index, np.arange(10, 60), seed=3)
    assert len(set(rows.tolist())) == len(rows) == NUM_EXAMPLES
    assert rows.min() >= 10
    assert index.labeled[rows].tolist() == [True] * 8 + [False] * 4
    assert choose_examples(index, np.arange(10, 60), seed=3).tolist() == rows.tolist()
    assert choose_examples(index, np.arange(10, 60), seed=4).tolist() != rows.tolist()
    assert len(choose_examples(index, np.arange(30, 60), seed=3)) == NUM_EXAMPLES
    assert choose_examples(index, np.array([2, 40]), seed=3).tolist() == [2, 40]


def test_thumbnails_keep_the_shape_of_any_image(tmp_path: Path) -> None:
    sizes = [(360, 480), (20, 10), (100, 2000), (900, 30)]
    images = [(np.full((*size, 3), 90, np.uint8), np.zeros(size, np.uint8)) for size in sizes]
    for size, thumbnail in zip(sizes, thumbnails(stored(tmp_path, images), np.arange(4), PALETTE), strict=True):
        height, width = thumbnail.picture.shape[:2]
        side = (width - 2) // 2
        assert side / height == pytest.approx(size[1] / size[0], rel=0.1)
        assert height <= 200
        assert side <= 400
        assert (thumbnail.picture[:, :side] == 90).all()
        assert (
            thumbnail.picture[:, side + 2 :] == paint_mask(np.zeros((1, 1), np.uint8), PALETTE, images[0][0][:1, :1])
        ).all()


def test_without_a_mask_there_is_no_overlay_and_what_is_damaged_is_left_out(tmp_path: Path) -> None:
    images = [(np.full((50, 100, 3), 30 * k, np.uint8), None) for k in range(3)]
    index = stored(tmp_path, images)
    data = bytearray((tmp_path / "f").read_bytes())
    data[int(index.locations.image[1, 0]) + 20] ^= 1
    (tmp_path / "f").write_bytes(data)
    made = thumbnails(index, np.arange(3), PALETTE)
    assert [thumbnail.id for thumbnail in made] == ["image 0", "image 2"]
    assert not made[0].labeled
    assert made[0].picture.shape == (200, 400, 3)


def sheet_of(sizes: list[tuple[int, int]], classes: int) -> tuple[NDArray[np.uint8], list[Thumbnail]]:
    """Returns a sheet of flat pictures, each in a colour of its own, and the pictures."""
    made = [
        Thumbnail("a-very-long-name-" * 9 + str(k), np.full((*size, 3), (1, 2, 3 + k), np.uint8), k % 2 == 0)
        for k, size in enumerate(sizes)
    ]
    names = [f"class {k}" for k in range(classes - 1)] + ["the last one with a name that goes on and on " * 8]
    sheet = contact_sheet("A title that does not fit " * 20, made, names, MANY[:classes], absent=["class 0"])
    return np.asarray(sheet), made


@pytest.mark.parametrize("classes", [2, 150])
def test_nothing_on_a_sheet_is_cut_off(classes: int) -> None:
    sizes = [(200, 500), (200, 90), (40, 802), (200, 20), (10, 802), (200, 802), (200, 300)]
    sheet, made = sheet_of(sizes, classes)
    for thumbnail in made:
        of_its_color = (sheet == thumbnail.picture[0, 0]).all(axis=-1)
        assert of_its_color.sum() == thumbnail.picture.shape[0] * thumbnail.picture.shape[1]
        rows, columns = np.flatnonzero(of_its_color.any(axis=1)), np.flatnonzero(of_its_color.any(axis=0))
        assert (len(rows), len(columns)) == thumbnail.picture.shape[:2]
    assert sheet.shape[1] <= 1680
    for edge in (sheet[:20], sheet[-20:], sheet[:, :20], sheet[:, -20:]):
        assert (edge == 255).all()


@pytest.mark.parametrize("classes", [2, 150])
def test_the_legend_has_a_swatch_of_every_class_and_of_ignored_pixels(classes: int) -> None:
    sheet, _ = sheet_of([(20, 20)], classes)
    colors, counts = np.unique(sheet.reshape(-1, 3), axis=0, return_counts=True)
    pixels = dict(zip(map(tuple, colors.tolist()), counts.tolist(), strict=True))
    assert [pixels[color] for color in MANY[:classes]] == [14 * 14] * classes  # within their outlines
    inner = paint_swatch(IGNORE, MANY)[1:-1, 1:-1]
    # The template match is a Fourier transform in float32: it finds where, and the pixels there must be equal.
    difference = cv2.matchTemplate(sheet[:, :400], inner, cv2.TM_SQDIFF)
    top, left = np.unravel_index(difference.argmin(), difference.shape)
    assert np.array_equal(sheet[top : top + inner.shape[0], left : left + inner.shape[1]], inner)


def test_names_that_do_not_fit_keep_both_ends() -> None:
    assert shorten_text("frankfurt_000001", 500, 14) == "frankfurt_000001"
    short = shorten_text("frankfurt_000001_leftImg8bit", 120, 14)
    head, tail = short.split("…")
    assert "frankfurt_000001_leftImg8bit".startswith(head)
    assert "frankfurt_000001_leftImg8bit".endswith(tail)
    assert min(len(head), len(tail)) >= 4
    assert 90 < _font(14).getlength(short) <= 120


@pytest.fixture
def fonts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder in which alone fonts are looked for, without fontconfig."""
    folder = tmp_path / "fonts" / "truetype"
    folder.mkdir(parents=True)
    monkeypatch.setattr(picture, "_FONT_FOLDERS", (str(folder.parent),))
    monkeypatch.setenv("PATH", str(tmp_path))
    picture._font_file.cache_clear()
    yield folder
    picture._font_file.cache_clear()


ODD_NAMES = ["人行道", "дорога", "chaussée", "شارع", "\U0001f6a7", "e\u0301", "\ue000"]


@pytest.mark.parametrize("name", ODD_NAMES)
def test_a_name_is_drawn_in_a_font_that_has_it_or_not_at_all(fonts: Path, name: str) -> None:
    assert class_label(name, 7) == "class 7"
    assert image_label(name, 12) == "image 12"
    (fonts / "ASans.ttf").write_bytes(b"damaged")
    write_font(fonts / "BSans.ttf", name[:-1] + "abc…")
    picture._font_file.cache_clear()
    assert class_label(name, 7) == "class 7"
    right = write_font(fonts / "OtherSans-Bold.TTF", name + "…")
    picture._font_file.cache_clear()
    assert class_label(name, 7) == image_label(name, 12) == name
    assert picture._font_file("".join(sorted({*name, "…"}))) == str(right)


def test_no_sheet_has_a_box_for_a_character(fonts: Path) -> None:
    """Every glyph that is drawn is looked at: none is what the font draws for a character that it lacks."""
    drawn: list[tuple[str, ImageFont.FreeTypeFont]] = []

    def sheet() -> Image.Image:
        made = [Thumbnail(f"{name} 0{n}", np.zeros((200, 300, 3), np.uint8), True) for n, name in enumerate(ODD_NAMES)]
        return contact_sheet("人行道 · train", made, ODD_NAMES, MANY[: len(ODD_NAMES)], [ODD_NAMES[0]])

    original = picture.ImageDraw.ImageDraw.text
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            picture.ImageDraw.ImageDraw,
            "text",
            lambda self, at, text, **how: drawn.append((text, how["font"])) or original(self, at, text, **how),
        )
        sheet()
        without = list(drawn)
        drawn.clear()
        write_font(fonts / "Sans.ttf", "人行道· train0123456789()absent…")
        picture._font_file.cache_clear()
        sheet()
    for text, font in [*without, *drawn]:
        missing = bytes(font.getmask("\U0010ffff"))
        assert not [c for c in text if not c.isspace() and bytes(font.getmask(c)) == missing], text
    assert [text for text, _ in without][:3] == ["??? · train", "class 0 (absent)", "class 1"]
    assert "image 1" in [text for text, _ in without]
    assert [text for text, _ in drawn][:3] == ["人行道 · train", "人行道 (absent)", "class 1"]
    assert "人行道 00" in [text for text, _ in drawn]


def test_what_is_no_picture_is_not_drawn(fonts: Path) -> None:
    assert class_label("a\u200db\u202e", 1) == "ab"
    assert class_label("a\x1b[31m\n", 1) == "a\\x1b[31m\\n"


@pytest.mark.skipif(shutil.which("fc-list") is None, reason="asks fontconfig")
def test_fontconfig_is_asked_first() -> None:
    files = picture._system_fonts("a…")
    assert all(Path(file).is_file() for file in files)
    assert picture._system_fonts("\U0010fffd人\U000e0fff") == []
