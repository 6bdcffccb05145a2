"""Raw files to items: an image and its mask together, as shards will hold them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from trees import READER, encoded, pair, patches, save, scene

from cps_ray.datasets.images import decode_image, decode_mask, perceptual_hash
from cps_ray.datasets.prepare.findings import BadItemError
from cps_ray.datasets.prepare.items import FromFiles, Item, MaskFile, Source
from cps_ray.datasets.raster import turned

MAKE_ITEM = FromFiles(READER)
ORIENTATION = 0x0112


def mask_of(item: Item) -> Any:
    assert item.mask is not None
    return decode_mask(item.mask)


def test_an_item_holds_what_the_checks_need(tmp_path: Path) -> None:
    item = MAKE_ITEM(pair(tmp_path, "a", values=(0, 2, 255)))
    mask = patches("a", (0, 2, 255))
    counts = np.bincount(mask.ravel(), minlength=256)
    assert (item.id, item.size, item.image) == ("a", (24, 32), (tmp_path / "a.png").read_bytes())
    assert np.array_equal(mask_of(item), mask)
    assert item.pixels.tolist() == counts[:3].tolist()
    assert item.values == {value: counts[value] for value in (0, 2, 255)}
    assert item.perceptual_hash == perceptual_hash(scene("a"))
    assert item.peak is None


def test_an_image_without_a_mask(tmp_path: Path) -> None:
    item = MAKE_ITEM(pair(tmp_path, "a", masked=False))
    assert (item.mask, item.pixels.tolist(), dict(item.values)) == (None, [0, 0, 0], {})


def test_shrunk_masks_hold_no_new_ids_and_images_no_new_loss(tmp_path: Path) -> None:
    """Ids 0 and 2 lie side by side: interpolation would put 1 between them."""
    save(tmp_path / "a.jpg", scene("a", (60, 80)), quality=95)
    save(tmp_path / "a.png", (np.indices((60, 80)).sum(axis=0) % 2 * 2).astype(np.uint8))
    item = FromFiles(READER, scale=0.3)(Source("a", str(tmp_path / "a.jpg"), (MaskFile(str(tmp_path / "a.png")),)))
    assert item.size == (18, 24)
    assert set(np.unique(mask_of(item))) == {0, 2}
    assert item.image.startswith(b"\x89PNG")
    assert decode_image(item.image).shape == (18, 24, 3)
    assert sum(item.values.values()) == 60 * 80, "raw values are counted before"


def test_uncompressed_images_are_larger_and_the_same_pixels(tmp_path: Path) -> None:
    save(tmp_path / "a.png", scene("a", (60, 80)))
    save(tmp_path / "b.jpg", scene("b", (60, 80)))
    make_item = FromFiles(READER, compressed=False)
    item = make_item(Source("a", str(tmp_path / "a.png")))
    assert len(item.image) > 60 * 80 * 3
    assert np.array_equal(decode_image(item.image), scene("a", (60, 80)))
    assert make_item(Source("b", str(tmp_path / "b.jpg"))).image == (tmp_path / "b.jpg").read_bytes()
    shrunk = FromFiles(READER, scale=0.5, compressed=False)(Source("b", str(tmp_path / "b.jpg")))
    assert len(shrunk.image) > 30 * 40 * 3


@pytest.mark.parametrize("both", [True, False], ids=["both turned", "the mask drawn on the turned image"])
@pytest.mark.parametrize("orientation", [3, 6])
def test_image_and_mask_are_turned_together(tmp_path: Path, orientation: int, both: bool) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    stored = patches("a", (0, 1, 2))
    (tmp_path / "a.png").write_bytes(encoded(scene("a"), "PNG", exif=exif))
    if both:
        (tmp_path / "m.png").write_bytes(encoded(stored, "PNG", exif=exif))
    else:
        save(tmp_path / "m.png", turned(stored, orientation))
    source = Source("a", str(tmp_path / "a.png"), (MaskFile(str(tmp_path / "m.png")),))
    if orientation == 3 and not both:
        with pytest.raises(BadItemError, match="nothing tells whether its mask is turned too"):
            MAKE_ITEM(source)
        return
    item = MAKE_ITEM(source)
    assert item.size == turned(stored, orientation).shape
    assert np.array_equal(mask_of(item), turned(stored, orientation))
    wanted = np.stack([turned(scene("a")[..., channel], orientation) for channel in range(3)], axis=-1)
    assert np.array_equal(decode_image(item.image), wanted)


def test_items_of_images_with_more_than_8_bits_hold_their_peak(tmp_path: Path) -> None:
    save(tmp_path / "a.png", np.full((4, 4), 4000, np.uint16))
    assert MAKE_ITEM(Source("a", str(tmp_path / "a.png"))).peak == 4000
    item = FromFiles(READER, value_range=(0, 4000))(Source("a", str(tmp_path / "a.png")))
    assert decode_image(item.image).min() == 255


def test_missing_files_are_reported(tmp_path: Path) -> None:
    source = pair(tmp_path, "a")
    (tmp_path / "a_mask.png").unlink()
    with pytest.raises(
        BadItemError, match=r"a_mask.png: the file cannot be read \(No such file or directory\); get it"
    ):
        MAKE_ITEM(source)
