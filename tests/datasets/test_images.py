"""Raw images of every kind become what shards hold: the same pixels, the right way up, or a sentence that says why not."""

import io
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image
from trees import POINTER, encoded, scene

from cps_ray.datasets.images import (
    decode_image,
    decode_mask,
    encode_image,
    encode_mask,
    perceptual_hash,
    read_image,
)
from cps_ray.datasets.raster import turned
from cps_ray.errors import DataError

PIXELS = scene("a photo", (60, 80))
ORIENTATION = 0x0112


def with_orientation(kind: str, orientation: int, **options: Any) -> bytes:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    return encoded(PIXELS, kind, exif=exif, **options)


def deep(values: Any, kind: str = ".tiff") -> bytes:
    """Returns 16-bit or float pixels, encoded."""
    return bytes(cv2.imencode(kind, np.asarray(values))[1])


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("PNG", {}),
        ("TIFF", {}),
        ("TIFF", {"compression": "tiff_lzw"}),
        ("BMP", {}),
        ("WEBP", {"lossless": True}),
        ("PPM", {}),
    ],
    ids=str,
)
def test_lossless_kinds_keep_every_pixel(kind: str, options: dict[str, Any]) -> None:
    data = encoded(PIXELS, kind, **options)
    picture = read_image(data)
    assert np.array_equal(picture.pixels, PIXELS)
    assert np.array_equal(decode_image(picture.data), PIXELS)
    assert (picture.data == data) == (kind == "PNG")
    assert picture.peak is None


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"quality": 30}, {"subsampling": 0}], ids=str)
def test_jpegs_are_kept_byte_for_byte(options: dict[str, Any]) -> None:
    data = encoded(PIXELS, "JPEG", **options)
    picture = read_image(data)
    assert picture.data == data
    assert np.array_equal(decode_image(data), picture.pixels)


def test_a_phones_jpeg_with_a_preview_behind_it_is_a_jpeg() -> None:
    buffer = io.BytesIO()
    photo = Image.fromarray(PIXELS)
    photo.save(buffer, "MPO", save_all=True, append_images=[photo.resize((8, 6))])
    picture = read_image(buffer.getvalue())
    assert picture.data == buffer.getvalue()
    assert picture.pixels.shape == PIXELS.shape


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "1"])
def test_grey_alpha_and_palette_become_rgb(mode: str) -> None:
    image = Image.fromarray(PIXELS).convert(mode)
    if mode in ("LA", "RGBA"):
        image.putalpha(7)  # what lies below the alpha is kept
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    pixels = read_image(buffer.getvalue()).pixels
    assert pixels.shape == PIXELS.shape
    assert np.array_equal(pixels, np.asarray(image.convert("RGB")))


def test_cmyk_jpegs_become_rgb() -> None:
    buffer = io.BytesIO()
    Image.fromarray(PIXELS).convert("CMYK").save(buffer, "JPEG", quality=100)
    pixels = read_image(buffer.getvalue()).pixels
    assert np.abs(pixels.astype(int) - PIXELS).mean() < 5


@pytest.mark.parametrize("kind", [".png", ".tiff"])
def test_16_bits_become_8_over_the_whole_range(kind: str) -> None:
    picture = read_image(deep(np.array([[0, 257, 32896, 65535]], np.uint16), kind))
    assert picture.pixels[0, :, 0].tolist() == [0, 1, 128, 255]
    assert picture.peak == 65535
    assert np.array_equal(decode_image(picture.data), picture.pixels)


def test_a_value_range_says_what_is_black_and_white() -> None:
    picture = read_image(deep(np.array([[0, 100, 2100, 4100, 9000]], np.uint16)), (100, 4100))
    assert picture.pixels[0, :, 0].tolist() == [0, 0, 128, 255, 255]


def test_floats_need_a_value_range_and_lose_nan() -> None:
    data = deep(np.array([[0.0, 0.5, 1.0, np.nan, np.inf]], np.float32))
    with pytest.raises(DataError, match=r"the file holds float32 values; say .* `value_range: \[0, 1\]`"):
        read_image(data)
    assert read_image(data, (0.0, 1.0)).pixels[0, :, 0].tolist() == [0, 128, 255, 0, 255]


def test_16_bit_colours_stay_in_order() -> None:
    red = np.zeros((2, 2, 3), np.uint16)
    red[..., 2] = 65535  # OpenCV writes BGR
    assert read_image(deep(red, ".png")).pixels[0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_turned_as_their_exif_says_in_training_too(kind: str, orientation: int) -> None:
    options = {"JPEG": {"quality": 100}, "WEBP": {"lossless": True}}.get(kind, {})
    picture = read_image(with_orientation(kind, orientation, **options))
    wanted = np.stack([turned(PIXELS[..., channel], orientation) for channel in range(3)], axis=-1)
    assert picture.pixels.shape == wanted.shape
    assert np.abs(picture.pixels.astype(int) - wanted).mean() < (6 if kind == "JPEG" else 0.001)
    assert np.array_equal(decode_image(picture.data), picture.pixels)
    assert picture.orientation == orientation


def test_turning_is_what_the_exif_standard_says() -> None:
    """The first pixel of the file is seen in the corner that the table of the standard gives for each orientation."""
    stored = np.array([[1, 2, 3], [4, 5, 6]])
    corner = {1: (0, 0), 2: (0, -1), 3: (-1, -1), 4: (-1, 0), 5: (0, 0), 6: (0, -1), 7: (-1, -1), 8: (-1, 0)}
    for orientation, (row, column) in corner.items():
        seen = turned(stored, orientation)
        assert seen[row, column] == 1, orientation
        assert seen.shape == ((3, 2) if orientation >= 5 else (2, 3))


def test_a_nonsense_orientation_is_upright() -> None:
    assert read_image(with_orientation("JPEG", 0)).orientation == 1


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "BMP", "WEBP"])
def test_a_file_that_was_cut_short_anywhere_is_refused(kind: str) -> None:
    data = encoded(PIXELS, kind)
    for fraction in np.linspace(0, 0.999, 25):
        with pytest.raises(DataError, match=r"the file .*(get the file again|is it)"):
            read_image(data[: int(fraction * len(data))])


def test_messages_name_pointers_and_files_of_something_else() -> None:
    with pytest.raises(DataError, match=r"is a Git LFS pointer, not an image; fetch the files with `git lfs pull`"):
        read_image(POINTER)
    with pytest.raises(DataError, match=r"the file is a web page, not an image; the download has failed"):
        read_image(b"<html><b>")


def test_pages_and_frames_are_refused() -> None:
    pages = [Image.fromarray(PIXELS), Image.fromarray(PIXELS[::-1].copy())]
    for kind in ("TIFF", "WEBP"):
        buffer = io.BytesIO()
        pages[0].save(buffer, kind, save_all=True, append_images=pages[1:])
        with pytest.raises(DataError, match="has 2 pages or frames, but must have one; save each"):
            read_image(buffer.getvalue())


def test_what_pillow_takes_for_an_attack_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(DataError, match="must have at most 0 million px, but has more; cut it into tiles"):
        read_image(encoded(PIXELS, "PNG"))


def test_decoding_is_rgb() -> None:
    blue_in_bgr = np.zeros((2, 3, 3), np.uint8)
    blue_in_bgr[..., 0] = 250
    assert decode_image(deep(blue_in_bgr, ".png"))[0, 0].tolist() == [0, 0, 250]
    assert np.array_equal(decode_image(encode_image(PIXELS)), PIXELS)


def test_masks_survive_and_nothing_else_is_one() -> None:
    mask = np.arange(256, dtype=np.uint8).reshape(16, 16)
    assert np.array_equal(decode_mask(encode_mask(mask)), mask)
    with pytest.raises(DataError, match=r"mask must have one channel of uint8, but has shape \(60, 80, 3\)"):
        decode_mask(encoded(PIXELS, "PNG"))
    with pytest.raises(DataError, match=r"mask must have one channel of uint8, .* of uint16"):
        decode_mask(deep(np.zeros((2, 2), np.uint16), ".png"))
    with pytest.raises(DataError, match="mask is empty; prepare the data set again"):
        decode_mask(b"")


def differing_bits(first: np.ndarray, second: np.ndarray) -> int:
    return (perceptual_hash(first) ^ perceptual_hash(second)).bit_count()


def test_the_perceptual_hash_is_of_the_scene_not_of_the_file() -> None:
    photo = scene("street", (120, 160))
    small = cv2.resize(photo, (61, 47), interpolation=cv2.INTER_AREA)
    worse = decode_image(encoded(photo, "JPEG", quality=40))
    brighter = np.clip(photo.astype(int) + 12, 0, 255).astype(np.uint8)
    assert all(differing_bits(photo, other) <= 6 for other in (np.asarray(small), worse, brighter))
    others = [differing_bits(photo, scene(f"street {number}", (120, 160))) for number in range(20)]
    assert min(others) > 12
    assert 24 < np.mean(others) < 40
