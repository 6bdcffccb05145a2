"""Mask files of every kind become train ids, and files that are no masks are refused."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trees
from PIL import Image
from scipy.io import savemat
from trees import POINTER, encoded

from cps_ray.datasets.prepare.findings import BadItemError, Finding
from cps_ray.datasets.prepare.masks import MaskReader, RawMask, count_edges, pack_color
from cps_ray.datasets.raster import turned

MASK = np.array([[0, 1, 2, 0], [1, 1, 2, 0]], np.uint8)


def reader(classes: int = 3, **more: Any) -> MaskReader:
    return MaskReader("ids", {value: value for value in range(classes)} | {255: 255}, classes, **more)


def colors(*table: tuple[int, int, int]) -> MaskReader:
    return MaskReader("colors", {pack_color(color): place for place, color in enumerate(table)}, len(table))


def train_ids(data: bytes, path: str = "m.png", by: MaskReader | None = None) -> list[list[int]]:
    by = by or reader()
    return by.train_ids(path, by.read(path, data))[0].tolist()


def refused(data: bytes, path: str = "m.png", by: MaskReader | None = None) -> Finding:
    by = by or reader()
    with pytest.raises(BadItemError) as caught:
        by.train_ids(path, by.read(path, data))
    assert caught.value.finding.where == path
    assert "\n" not in str(caught.value)
    return caught.value.finding


def npy(values: Any) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.asarray(values))
    return buffer.getvalue()


def mat(**arrays: Any) -> bytes:
    buffer = io.BytesIO()
    savemat(buffer, arrays)
    return buffer.getvalue()


def palette_image(values: Any = MASK, palette: tuple[int, ...] = (255, 0, 0, 0, 255, 0, 0, 0, 255)) -> Image.Image:
    image = Image.fromarray(np.asarray(values, np.uint8))
    image.putpalette([*palette, *[7] * (768 - len(palette))])
    return image


def saved(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


# ------------------------------------------------------------------------------------------------- what can be read


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "BMP", "GIF", "WEBP"])
def test_lossless_images_of_ids(kind: str) -> None:
    options = {"lossless": True} if kind == "WEBP" else {}
    assert train_ids(encoded(MASK, kind, **options)) == MASK.tolist()


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "GIF", "BMP"])
def test_palette_images_keep_their_indices(kind: str) -> None:
    assert train_ids(saved(palette_image(), kind)) == MASK.tolist()


def test_the_palette_may_be_transparent() -> None:
    assert train_ids(saved(palette_image(), transparency=0)) == MASK.tolist()


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32, np.int64, np.float32, np.uint64], ids=str)
def test_arrays_of_whole_numbers(dtype: Any) -> None:
    assert train_ids(npy(MASK.astype(dtype)), "m.npy") == MASK.tolist()
    assert train_ids(npy(MASK.astype(dtype)[..., None]), "m.npy") == MASK.tolist()


def test_booleans_are_0_and_1() -> None:
    assert train_ids(npy(MASK > 0), "m.npy") == (MASK > 0).astype(int).tolist()
    assert train_ids(saved(Image.fromarray(MASK > 0))) == (MASK > 0).astype(int).tolist()


def test_grey_saved_as_rgb_or_rgba() -> None:
    assert train_ids(encoded(np.stack([MASK] * 3, axis=-1), "PNG")) == MASK.tolist()
    opaque = np.stack([MASK, MASK, MASK, np.full_like(MASK, 255)], axis=-1)
    assert train_ids(encoded(opaque, "PNG")) == MASK.tolist()


def test_matlab_files_of_sbd(tmp_path: Path) -> None:
    trees.mat(tmp_path / "m.mat", MASK)
    assert train_ids((tmp_path / "m.mat").read_bytes(), "m.mat") == MASK.tolist()


def test_matlab_files_of_one_matrix() -> None:
    assert train_ids(mat(labels=MASK.astype(float)), "m.mat") == MASK.tolist()
    assert train_ids(mat(labels=MASK, about="by hand"), "m.mat") == MASK.tolist()


def test_16_bit_ids_may_be_anything_the_table_knows() -> None:
    by = MaskReader("ids", {26001: 0, 65535: 255, 7: 1}, 2)
    values = np.array([[26001, 7, 65535]], np.uint16)
    assert train_ids(encoded(values, "PNG"), by=by) == [[0, 1, 255]]
    assert train_ids(npy(np.array([[-1, 5]])), "m.npy", MaskReader("ids", {-1: 255, 5: 0}, 1)) == [[255, 0]]


def test_the_histogram_counts_every_raw_value() -> None:
    by = MaskReader("ids", {7: 0, 8: 1, 9: 1, 11: 255}, 2)
    found, histogram = by.train_ids("m.png", RawMask(np.array([[7, 8, 11, 9], [7, 9, 9, 7]], np.uint8)))
    assert found.tolist() == [[0, 1, 255, 1], [0, 1, 1, 0]]
    assert histogram == {7: 3, 8: 1, 9: 3, 11: 1}


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
def test_colours_mean_classes(mode: str) -> None:
    by = colors((255, 0, 0), (0, 255, 0), (0, 0, 255))
    assert train_ids(saved(palette_image().convert(mode)), by=by) == MASK.tolist()


def test_colours_of_a_transparent_palette() -> None:
    image = palette_image()
    by = colors((255, 0, 0), (0, 255, 0), (0, 0, 255))
    assert train_ids(saved(image, transparency=9), by=by) == MASK.tolist()


def test_grey_levels_are_colours_too() -> None:
    by = colors((0, 0, 0), (255, 255, 255))
    assert train_ids(encoded(np.array([[0, 255]], np.uint8), "PNG"), by=by) == [[0, 1]]


# ------------------------------------------------------------------------------------------------- what is no mask


def test_a_jpeg_does_not_keep_ids() -> None:
    assert "must be lossless, but this is a grey JPEG of 8 bits" in refused(encoded(MASK, "JPEG"), "m.jpg").found
    assert "must be lossless" in refused(encoded(MASK, "JPEG"), "m.png").found, "whatever its name says"


def test_unknown_values_are_listed_with_their_pixels() -> None:
    found = refused(encoded(np.array([[0, 1, 7, 3], [0, 1, 2, 3]], np.uint8), "PNG"))
    assert "must be in the class table, but this one also holds 3 (2 px), 7 (1 px)" in found.found
    assert found.remedy == "map them with `ids` or `ignore_ids` in the recipe"


def test_ids_that_start_at_1_are_recognised() -> None:
    found = refused(encoded(MASK + 1, "PNG"))
    assert "3 (2 px)" in found.found
    assert found.remedy == "the ids seem to start at 1: give the classes `ids` in the recipe"


def test_grey_levels_are_recognised() -> None:
    found = refused(encoded(np.arange(64, dtype=np.uint8).reshape(8, 8), "PNG"))
    assert "and 51 more" in found.found
    assert found.remedy.startswith("so many are grey levels or smoothed edges: export the masks again as ids")


def test_anti_aliased_binary_masks_are_recognised() -> None:
    white = np.zeros((64, 64), np.uint8)
    white[16:48, 16:48] = 255
    smooth = np.asarray(
        Image.fromarray(white).resize((150, 150), Image.Resampling.BICUBIC).rotate(10, Image.Resampling.BICUBIC)
    )
    assert "smoothed edges" in refused(encoded(smooth, "PNG"), by=MaskReader("ids", {0: 0, 255: 1}, 2)).remedy


def test_instance_masks_are_recognised() -> None:
    found = refused(encoded(np.full((2, 4), 26001, np.uint16), "PNG"))
    assert "26001 (8 px)" in found.found
    assert "is this an instance mask?" in found.remedy


def test_a_colour_image_is_no_mask_of_ids() -> None:
    found = refused(saved(palette_image().convert("RGB")))
    assert "this is an RGB PNG of 8 bits" in found.found
    assert "`mask_coding: colors`" in found.remedy


def test_unknown_colours_are_listed() -> None:
    found = refused(saved(palette_image().convert("RGB")), by=colors((255, 0, 0), (0, 255, 0)))
    assert "mask colours must be in the class table, but this one also holds (0, 0, 255) (2 px)" in found.found
    assert "`ignore_colors`" in found.remedy


def test_transparent_masks_are_refused() -> None:
    clear = np.stack([MASK, MASK, MASK, np.where(MASK > 0, 255, 0).astype(np.uint8)], axis=-1)
    assert "must not be transparent" in refused(encoded(clear, "PNG")).found


@pytest.mark.parametrize(
    "values",
    [
        np.zeros((2, 4), np.float32) + 0.5,
        np.full((2, 4), np.nan),
        np.zeros((2, 4, 2), np.uint8),
        np.zeros((2, 4, 4), np.uint8),
        np.zeros((2, 4, 7), np.uint8),
        np.zeros(8, np.uint8),
        np.zeros((2, 4), complex),
    ],
    ids=lambda values: f"{values.shape} {values.dtype}",
)
def test_probabilities_and_planes_are_no_ids(values: np.ndarray) -> None:
    """Two or four planes of an array are a one-hot map, not an image with alpha."""
    found = refused(npy(values), "m.npy")
    assert "must hold (height, width) whole numbers" in found.found
    assert found.remedy == "save class ids, not probabilities or one-hot planes"


def test_cmyk_has_no_ids() -> None:
    cmyk = Image.fromarray(np.stack([np.zeros_like(MASK)] * 3, axis=-1)).convert("CMYK")
    assert "a TIFF of a rare kind (SEPARATED)" in refused(saved(cmyk, "TIFF"), "m.tif").found


def test_pages_are_refused() -> None:
    page = Image.fromarray(MASK)
    data = saved(page, "TIFF", save_all=True, append_images=[page])
    assert "has 2 pages or frames, but must have one" in refused(data, "m.tif").found


def test_lfs_pointers_are_recognised() -> None:
    for path in ("m.png", "m.mat", "m.npy"):
        assert refused(POINTER, path).remedy == "fetch the files with `git lfs pull`"


def test_too_large_masks_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 3)
    assert refused(encoded(MASK, "PNG")).remedy == "cut it into tiles"


def test_pickles_and_archives_are_not_opened() -> None:
    buffer = io.BytesIO()
    np.save(buffer, np.array([{"a": 1}], object), allow_pickle=True)
    assert "says (1,) of object, which is not what it holds" in refused(buffer.getvalue(), "m.npy").found
    buffer = io.BytesIO()
    np.savez(buffer, MASK)
    assert "is a ZIP archive" in refused(buffer.getvalue(), "m.npy").found


def test_a_mat_file_must_say_which_matrix_is_the_mask() -> None:
    found = refused(mat(labels=MASK, depth=MASK), "m.mat").found
    assert "must hold `GTcls` as SBD does, or one matrix, but holds labels, depth" in found


@pytest.mark.parametrize("path", ["m.png", "m.tif", "m.bmp", "m.npy", "m.mat"])
def test_damage_of_any_kind_is_a_finding(path: str) -> None:
    """Bytes changed and files cut short at random give other values or a finding, never another exception."""
    rng = np.random.default_rng(0)
    mask = np.kron(rng.integers(0, 3, (6, 8)), np.ones((4, 4), int)).astype(np.uint8)
    good = {
        "m.npy": npy(mask),
        "m.mat": mat(GTcls={"Segmentation": mask}),
        "m.png": encoded(mask, "PNG"),
        "m.tif": encoded(mask, "TIFF"),
        "m.bmp": encoded(mask, "BMP"),
    }[path]
    refusals = 0
    for attempt in range(150):
        data = bytearray(good)
        if attempt % 2:
            del data[int(rng.integers(len(data))) :]
        else:
            for at in rng.integers(len(data), size=2):
                data[at] = rng.integers(256)
        try:
            reader().read(path, bytes(data))
        except BadItemError as bad:
            refusals += bad.finding.where == path
    assert refusals >= 50


# ----------------------------------------------------------------------------------------------------- orientation

ORIENTATION = 0x0112


def aligned(raw: RawMask, size: tuple[int, int], orientation: int, **more: Any) -> np.ndarray:
    return reader(**more).align("m.png", raw, size, orientation).values


def oriented(orientation: int, kind: str = "PNG") -> bytes:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    return encoded(MASK, kind, exif=exif)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_mask_lies_as_its_own_exif_says(kind: str, orientation: int) -> None:
    found = reader().read("m", oriented(orientation, kind))
    assert np.array_equal(found.values, turned(MASK, orientation))
    assert found.turned_by_exif == (orientation != 1)


@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
def test_a_mask_without_exif_follows_its_image_where_sizes_decide(orientation: int) -> None:
    drawn_on_stored = aligned(RawMask(MASK, False), (4, 2), orientation)
    assert np.array_equal(drawn_on_stored, turned(MASK, orientation))
    drawn_on_turned = aligned(RawMask(MASK, False), (2, 4), orientation)
    assert np.array_equal(drawn_on_turned, MASK)
    both_turned = aligned(RawMask(MASK, True), (2, 4), orientation)
    assert np.array_equal(both_turned, MASK)


@pytest.mark.parametrize(("orientation", "size"), [(2, (2, 4)), (3, (2, 4)), (4, (2, 4)), (6, (2, 2))])
def test_an_ambiguous_orientation_is_refused(orientation: int, size: tuple[int, int]) -> None:
    mask = np.zeros(size, np.uint8)
    with pytest.raises(BadItemError, match=rf"EXIF orientation {orientation}, and nothing tells .*masks_turned"):
        aligned(RawMask(mask, False), size, orientation)
    assert np.array_equal(aligned(RawMask(mask, True), size, orientation), mask)


@pytest.mark.parametrize("orientation", [1, 6])
def test_a_size_mismatch_names_both_sizes(orientation: int) -> None:
    message = "image is 9x8 px and the mask 4x2 px; export both at one size"
    with pytest.raises(BadItemError, match=message):
        aligned(RawMask(MASK, False), (8, 9), orientation)


# ------------------------------------------------------------------------------------------------- smoothed edges


def test_interpolated_masks_pass_through_the_ids_between() -> None:
    sharp = trees.patches("edges", (0, 4, 9), (48, 64))
    sharp_edges, smooth_edges = count_edges(sharp)
    assert sharp_edges > 0
    assert smooth_edges == 0
    smooth = np.asarray(Image.fromarray(sharp).resize((128, 96), Image.Resampling.BILINEAR))
    sharp_edges, smooth_edges = count_edges(smooth)
    assert smooth_edges > sharp_edges


def test_the_ignored_border_is_no_edge() -> None:
    bordered = np.array([[0, 0, 255, 9, 9], [0, 255, 4, 255, 9]], np.uint8)
    assert count_edges(bordered) == (0, 0)
