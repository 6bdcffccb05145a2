"""One opening of an image file: every kind that it reads has the writer's own values, everything else is named and refused."""

import io
import struct
import zlib
from typing import Any

import cv2
import imageio.v3 as imageio
import numpy as np
import pytest
import tifffile
from PIL import Image

from cps_ray.datasets.images import decode_image, read_image
from cps_ray.datasets.raster import Raster, UnreadableError, open_raster, upright_size

RNG = np.random.default_rng(0)
SIZE = (20, 31)


def noise(dtype: Any, channels: int = 1) -> np.ndarray:
    """Random values over the whole range of a dtype: (20, 31) or (20, 31, C)."""
    dtype = np.dtype(dtype)
    shape = SIZE if channels == 1 else (*SIZE, channels)
    if dtype.kind == "f":
        return RNG.normal(0, 1000, shape).astype(dtype)
    info = np.iinfo(dtype)
    return RNG.integers(info.min, info.max, shape, dtype=dtype, endpoint=True)


def by_pillow(pixels: Any, kind: str, mode: str | None = None, **options: Any) -> bytes:
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    buffer = io.BytesIO()
    (image.convert(mode) if mode else image).save(buffer, kind, **options)
    return buffer.getvalue()


def by_opencv(pixels: np.ndarray, suffix: str) -> bytes:
    bgr = pixels if pixels.ndim == 2 else pixels[..., [2, 1, 0, 3][: pixels.shape[2]]]
    return bytes(cv2.imencode(suffix, bgr)[1])


def by_tifffile(pixels: np.ndarray, **options: Any) -> bytes:
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, pixels, **options)
    return buffer.getvalue()


def png(samples: np.ndarray, bits: int, color: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG of `bits` bits a sample, written out by hand; `chunks` come before the pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    height, width = samples.shape[:2]
    unpacked = np.unpackbits(samples.reshape(height, -1, 1), axis=-1)[..., 8 - bits :].reshape(height, -1)
    rows = b"".join(b"\0" + np.packbits(row).tobytes() for row in unpacked)
    header = struct.pack(">IIBBBBB", width, height, bits, color, 0, 0, 0)
    parts = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def same(raster: Raster, values: np.ndarray) -> bool:
    """Whether the raster holds these values, (H, W) or (H, W, C), with its alpha as the last channel."""
    samples = raster.samples if raster.alpha is None else np.dstack([raster.samples, raster.alpha])
    return np.array_equal(samples, values if values.ndim == 3 else values[..., None]) and samples.dtype == values.dtype


# ---------------------------------------------------------------------------------- what is read: the table in the docs


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_pngs_of_every_writer(dtype: Any, channels: int) -> None:
    values = noise(dtype, channels)
    assert same(open_raster(by_opencv(values, ".png")), values)
    if dtype == np.uint8 or channels == 1:
        assert same(open_raster(by_pillow(values, "PNG")), values)
        assert same(open_raster(imageio.imwrite("<bytes>", values, extension=".png")), values)


def test_png_of_16_bit_grey_with_alpha() -> None:
    values = noise(np.uint16, 2)
    data = png(np.frombuffer(values.astype(">u2").tobytes(), np.uint8).reshape(*SIZE, 4), 8, 6)
    as_16 = data[:24] + bytes([16, 4]) + data[26:]
    fixed = as_16[:29] + struct.pack(">I", zlib.crc32(as_16[12:29])) + as_16[33:]
    assert same(open_raster(fixed), values)


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_few_bits_of_grey_stay_ids_and_become_grey_levels_of_images(bits: int) -> None:
    values = RNG.integers(0, 2**bits, SIZE, np.uint8)
    data = png(values, bits, 0)
    raster = open_raster(data)
    assert same(raster, values)
    assert raster.white == 2**bits - 1
    wanted = np.repeat((values * (255 // raster.white))[..., None], 3, axis=2)
    assert np.array_equal(read_image(data).pixels, wanted)
    assert np.array_equal(decode_image(read_image(data).data), wanted)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "GIF", "BMP"])
def test_palettes_keep_indices_and_colours(kind: str, bits: int) -> None:
    values = RNG.integers(0, 2**bits, SIZE, np.uint8)
    colors = RNG.permutation(256)[:, None] * [1, 3, 7] % 256
    image = Image.fromarray(values)
    image.putpalette(colors.astype(np.uint8).tobytes())
    raster = open_raster(by_pillow(image, kind, **({"bits": bits} if kind == "PNG" else {})))
    assert raster.palette is not None
    assert np.array_equal(raster.palette[raster.samples[..., 0]], colors[values])
    if kind != "GIF":  # which leaves out colours that are not used
        assert same(raster, values)


COMPRESSIONS = [None, "lzw", "zlib", "deflate", "packbits", "zstd"]


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int16, np.uint32, np.int64, np.float32, np.float64], ids=str)
@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5, 10])
def test_tiffs_of_any_depth_and_number_of_bands(channels: int, dtype: Any) -> None:
    values = noise(dtype, channels)
    photometric = "rgb" if channels in (3, 4) else "minisblack"
    for compression in COMPRESSIONS:
        options: dict[str, Any] = {"photometric": photometric, "compression": compression}
        together = by_tifffile(values, planarconfig="contig" if channels > 1 else None, **options)
        assert same(open_raster(together), values)
        if channels > 1:
            apart = by_tifffile(np.moveaxis(values, 2, 0).copy(), planarconfig="separate", **options)
            assert same(open_raster(apart), values)
    tiled = by_tifffile(values, photometric=photometric, planarconfig="contig" if channels > 1 else None, tile=(16, 16))
    assert same(open_raster(tiled), values)


@pytest.mark.parametrize(("dtype", "channels"), [(np.uint8, 1), (np.uint8, 3), (np.uint16, 3), (np.float32, 3)])
def test_tiffs_of_opencv(dtype: Any, channels: int) -> None:
    values = noise(dtype, channels)
    assert same(open_raster(by_opencv(values, ".tiff")), values)


@pytest.mark.parametrize("compression", [None, "tiff_lzw", "tiff_adobe_deflate", "packbits"])
@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "1", "I;16", "F"])
def test_tiffs_of_pillow(mode: str, compression: str | None) -> None:
    values = {"1": noise(np.uint8) > 127, "I;16": noise(np.uint16), "F": noise(np.float32)}.get(mode)
    if values is None:
        values = noise(np.uint8, {"L": 1, "RGB": 3, "RGBA": 4}[mode])
    raster = open_raster(by_pillow(values, "TIFF", compression=compression))
    assert same(raster, values.astype(np.uint8) if mode == "1" else values)


@pytest.mark.parametrize("kind", ["BMP", "WEBP", "PPM"])
@pytest.mark.parametrize("channels", [1, 3])
def test_other_lossless_kinds(kind: str, channels: int) -> None:
    values = noise(np.uint8, channels)
    raster = open_raster(by_pillow(values, kind, **({"lossless": True} if kind == "WEBP" else {})))
    if kind == "WEBP" and channels == 1:
        values = np.repeat(values[..., None], 3, axis=2)  # it has no grey
    assert same(raster, values)
    assert not raster.lossy


@pytest.mark.parametrize("white", [1, 20, 255, 4095, 65535])
@pytest.mark.parametrize("channels", [1, 3])
def test_pnms_keep_values_whatever_their_largest(white: int, channels: int) -> None:
    """Pillow scales them to 0..255, which changes ids."""
    values = RNG.integers(0, white + 1, (*SIZE, channels)).astype(np.uint8 if white < 256 else ">u2")
    data = f"P{5 if channels == 1 else 6}\n# a comment\n31 20\n{white}\n".encode() + values.tobytes()
    assert same(open_raster(data), values.astype(values.dtype.newbyteorder("=")))


@pytest.mark.parametrize("data", [by_pillow(noise(np.uint8, 3), "JPEG"), by_pillow(noise(np.uint8, 3), "WEBP")])
def test_what_may_have_changed_values_is_lossy(data: bytes) -> None:
    assert open_raster(data).lossy


def test_tiffs_packed_as_jpeg_are_lossy() -> None:
    assert open_raster(by_tifffile(noise(np.uint8, 3), photometric="rgb", compression="jpeg")).lossy


def test_overviews_and_thumbnails_are_not_the_picture() -> None:
    values = noise(np.uint16, 3)
    buffer = io.BytesIO()
    with tifffile.TiffWriter(buffer) as file:
        file.write(values, photometric="rgb", tile=(16, 16))
        file.write(values[::2, ::2].copy(), photometric="rgb", subfiletype=1)
    assert same(open_raster(buffer.getvalue()), values)


# ------------------------------------------------------------------------------------------------ images of many kinds


def test_16_bit_rgb_tiffs_become_the_same_8_bits_at_every_run() -> None:
    values = noise(np.uint16, 3)
    wanted = (values / 65535 * 255).round().astype(np.uint8)
    for data in (by_opencv(values, ".tiff"), by_tifffile(values, photometric="rgb")):
        assert np.array_equal(read_image(data).pixels, wanted)
        assert np.array_equal(decode_image(read_image(data).data), wanted)


def test_an_infrared_band_that_is_called_alpha_does_not_dim_the_colours() -> None:
    values = noise(np.uint8, 4)
    data = by_tifffile(values, photometric="rgb", extrasamples=["unassalpha"])
    picture = read_image(data)
    assert np.array_equal(picture.pixels, values[..., :3])
    assert picture.aside == "the fourth band of an RGB TIFF of 8 bits with alpha"
    assert np.array_equal(read_image(data, bands=(4, 1, 2)).pixels, values[..., [3, 0, 1]])


def test_many_bands_need_a_choice_and_signed_values_a_range() -> None:
    values = noise(np.int16, 5)
    data = by_tifffile(values, photometric="minisblack", planarconfig="contig")
    with pytest.raises(UnreadableError, match=r"is a TIFF of 5 bands of int16; say .* `bands: \[3, 2, 1\]`"):
        read_image(data)
    with pytest.raises(UnreadableError, match=r"holds int16 values; say .* `value_range"):
        read_image(data, bands=(5, 3, 1))
    with pytest.raises(UnreadableError, match=r"should have band 6, .* is a TIFF of 5 bands"):
        read_image(data, bands=(6, 3, 1))
    pairs = ((-1000.0, 1000.0), (0.0, 500.0), (-32768.0, 32767.0))
    wanted = np.stack(
        [
            np.clip((values[..., at].astype(float) - low) * 255 / (high - low), 0, 255).round()
            for at, (low, high) in zip((4, 2, 0), pairs, strict=True)
        ],
        axis=-1,
    )
    assert np.array_equal(read_image(data, pairs, (5, 3, 1)).pixels, wanted)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_one_channel_stays_one_channel(dtype: Any) -> None:
    picture = read_image(by_pillow(noise(dtype), "TIFF"))
    assert picture.grey
    assert open_raster(picture.data).samples.shape == (*SIZE, 1)
    assert np.array_equal(decode_image(picture.data), picture.pixels)


def test_exif_and_not_xmp_turns_an_image() -> None:
    """Training lets OpenCV turn JPEGs, which does not know XMP."""
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:tiff="t"><d tiff:Orientation="6"/></rdf:RDF></x:xmpmeta>'
    data = by_pillow(noise(np.uint8, 3), "JPEG", xmp=xmp)
    assert read_image(data).orientation == 1
    assert read_image(data).pixels.shape == decode_image(data).shape == (*SIZE, 3)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_size_that_is_seen(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = by_pillow(noise(np.uint8, 3), kind, exif=exif)
    assert upright_size(data) == (SIZE if orientation < 5 else SIZE[::-1], orientation)
    assert read_image(data).pixels.shape[:2] == upright_size(data)[0]


def test_12_bits_whose_white_the_file_says_are_not_dark() -> None:
    values = RNG.integers(0, 4096, SIZE).astype(">u2")
    picture = read_image(b"P5 31 20 4095\n" + values.tobytes())
    assert np.array_equal(picture.pixels[..., 0], (values * (255 / 4095)).round().astype(np.uint8))
    assert picture.peak is None


# ---------------------------------------------------------------------------------------------------- what is refused

FOREIGN = {
    "phone.heic": (b"\0\0\0\x18ftypheic\0\0\0\0", "is HEIC, as phones write it; save it as JPEG"),
    "a.avif": (b"\0\0\0\x18ftypavif\0\0\0\0", "is AVIF"),
    "a.dcm": (bytes(128) + b"DICM", "is DICOM; save its slices as PNG"),
    "a.nii": (bytes(344) + b"n+1\0", r"volume \(NIfTI\); save its slices"),
    "a.nii.gz": (b"\x1f\x8b\x08", "packed with gzip; unpack it"),
    "a.json": (b'{"shapes": []}', "is JSON, not an image; annotations go under `masks`"),
    "a.svg": (b"<?xml version='1.0'?><svg/>", "is XML"),
    "a.png": (b"<!DOCTYPE html><html>", "web page, not an image; the download has failed"),
    "b.png": (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
    "a.jp2": (b"\0\0\0\x0cjP  \r\n\x87\n", "is JPEG 2000; save it as TIFF"),
    "a.nef": (b"II*\0" + bytes(40), r"a camera's raw file \(.nef\)"),
    "a.cr2": (b"II*\0\x10\0\0\0CR\2\0", "a camera's raw file"),
    "a.pdf": (b"%PDF-1.4", "is a PDF"),
    "a.h5": (b"\x89HDF\r\n\x1a\n", "HDF5 or MATLAB 7.3"),
    "a.npy": (b"\x93NUMPY\1\0", "NumPy array"),
    "a.exr": (b"v/1\x01", "OpenEXR"),
    "._a.jpg": (b"\0\5\x16\7\0\2\0\0", "macOS resource file"),
    "a.mov": (b"\0\0\0\x14ftypisom", "is a video"),
    "a.xyz": (b"who knows", r"no image that is known \(9 bytes, the first are b'who know'\)"),
    "a.bmp": (b"", "the file is empty; get the file again"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_foreign_files_are_named(name: str) -> None:
    data, said = FOREIGN[name]
    with pytest.raises(UnreadableError, match=said) as caught:
        open_raster(data, name)
    assert "\n" not in str(caught.value)
    assert caught.value.found.startswith("the file ")


def test_pages_and_stacks_are_refused() -> None:
    pages = by_tifffile(noise(np.uint8, 3).transpose(2, 0, 1).copy(), photometric="minisblack")
    stack = by_tifffile(noise(np.uint8, 3).transpose(2, 0, 1).copy(), imagej=True)
    frames = [Image.fromarray(noise(np.uint8)) for _ in range(2)]
    animated = by_pillow(frames[0], "PNG", save_all=True, append_images=frames[1:])
    for data, count in ((pages, 3), (stack, 3), (animated, 2)):
        with pytest.raises(UnreadableError, match=f"has {count} pages or frames, but must have one"):
            open_raster(data)


def test_a_camera_raw_file_of_any_name_is_not_its_preview() -> None:
    buffer = io.BytesIO()
    with tifffile.TiffWriter(buffer) as file:
        file.write(noise(np.uint8, 3), photometric="rgb", subifds=1, subfiletype=1)
        file.write(noise(np.uint16), photometric=32803, extratags=[(33421, "H", 2, (2, 2))])
    with pytest.raises(UnreadableError, match="camera's raw file; develop it"):
        open_raster(buffer.getvalue())


def test_what_a_header_promises_is_not_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bomb is refused by its header, before its pixels take memory."""
    bomb = png(np.zeros(SIZE, np.uint8), 8, 0)
    huge = bomb[:16] + struct.pack(">II", 100_000, 100_000) + bomb[24:]
    huge = huge[:29] + struct.pack(">I", zlib.crc32(huge[12:29])) + huge[33:]
    with pytest.raises(UnreadableError, match="must have at most 179 million px, but has more; cut it into tiles"):
        open_raster(huge)
    for data in (by_pillow(noise(np.uint8, 3), kind) for kind in ("JPEG", "TIFF", "BMP", "WEBP", "GIF", "PPM")):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
        open_raster(data)
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
        with pytest.raises(UnreadableError, match="must have at most 0 million px"):
            open_raster(data)


def test_a_flipped_bit_in_a_png_is_never_another_picture() -> None:
    data = by_pillow(noise(np.uint8, 3), "PNG")
    for _ in range(300):
        damaged = bytearray(data)
        damaged[int(RNG.integers(8, len(data)))] ^= 1 << int(RNG.integers(8))
        with pytest.raises(UnreadableError):
            open_raster(bytes(damaged))


def damaged(data: bytes, rng: np.random.Generator) -> bytes:
    """Cuts a file short, or changes some of its first bytes, or any."""
    changed = bytearray(data)
    how = rng.integers(3)
    if how == 0:
        del changed[int(rng.integers(len(changed))) :]
    else:
        for at in rng.integers(min(len(changed), 200 if how == 1 else len(changed)), size=int(rng.integers(1, 4))):
            changed[at] = rng.integers(256)
    return bytes(changed)


@pytest.mark.slow
def test_damaged_files_are_one_line_each_and_seldom_another_picture() -> None:
    """Formats with checksums (PNG) or redundant headers show damage; what others let pass is counted and bounded."""
    rng = np.random.default_rng(1)
    smooth = cv2.resize(noise(np.uint8, 3), (80, 60), interpolation=cv2.INTER_CUBIC)
    files = {
        "PNG": by_pillow(smooth, "PNG"),
        "palette PNG": by_pillow(Image.fromarray(smooth).convert("P"), "PNG"),
        "JPEG": by_pillow(smooth, "JPEG"),
        "TIFF": by_tifffile(smooth, photometric="rgb"),
        "packed TIFF": by_tifffile(smooth, photometric="rgb", compression="zlib"),
        "BMP": by_pillow(smooth, "BMP"),
        "WebP": by_pillow(smooth, "WEBP", lossless=True),
        "GIF": by_pillow(smooth, "GIF"),
        "PPM": by_pillow(smooth, "PPM"),
    }
    for kind, data in files.items():
        passed = 0
        for _ in range(600):
            broken = damaged(data, rng)
            said = ""
            try:
                passed += open_raster(broken).samples.shape[:2] != (60, 80)
            except UnreadableError as error:
                said = str(error)
            assert "\n" not in said
        assert passed <= (0 if "PNG" in kind else 12), f"{kind}: {passed} of 600 had another size and were read"
