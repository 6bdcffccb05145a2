"""One opening of an image file: says what it is and decodes it by one known-good route, or refuses it by name.

Images and masks both come through it. data/README.md has the table of what is read how. Values are as the file stores them:
neither turned as EXIF says, nor scaled, nor multiplied by an alpha, nor looked up in a palette.
"""

import io
import re
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image

from cps_ray.errors import DataError

IMAGE_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".png", ".tif", ".tiff", ".bmp", ".webp", ".gif", ".pnm", ".pgm", ".ppm", ".pbm"}
)
"""Suffixes, in lower case, by which images are known in a folder of all kinds of files."""
AGAIN = "get the file again"
_PNG = b"\x89PNG\r\n\x1a\n"
_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_AS_PNG = "save it as PNG"
_FOREIGN: tuple[tuple[int, bytes, str, str], ...] = (
    (0, b"version https://git-lfs", "is a Git LFS pointer, not an image", "fetch the files with `git lfs pull`"),
    (0, b"\0\5\x16\7", "is a macOS resource file, not an image", "leave out the files that begin with `._`"),
    (0, b"%PDF", "is a PDF", f"{_AS_PNG}, each page apart"),
    (0, b"8BPS", "is a Photoshop file", _AS_PNG),
    (0, b"PK\3\4", "is a ZIP archive", "unpack it"),
    (
        0,
        b"\x1f\x8b",
        "is packed with gzip",
        "unpack it; slices of a volume (.nii.gz) are to be saved as PNG, one a file",
    ),
    (0, b"\x89HDF", "is HDF5 or MATLAB 7.3", "save images as PNG, and masks as PNG, .npy or with `save(..., '-v7')`"),
    (0, b"\x93NUMPY", "is a NumPy array, not an image", _AS_PNG),
    (0, b"MATLAB 5.0", "is a MATLAB file, not an image", _AS_PNG),
    (0, b"v/1\x01", "is OpenEXR", "save it as float TIFF, and give the recipe a `value_range`"),
    (0, b"#?RADIANCE", "is Radiance HDR", "save it as float TIFF, and give the recipe a `value_range`"),
    (0, b"NRRD", "is a volume (NRRD)", "save its slices as PNG, one a file"),
    (128, b"DICM", "is DICOM", "save its slices as PNG, one a file (`dcmj2pnm`, 3D Slicer, or pydicom)"),
    (344, b"n+1\0", "is a volume (NIfTI)", "save its slices as PNG, one a file (3D Slicer, or nibabel)"),
    (0, b"\0\0\0\x0cjP  ", "is JPEG 2000", "save it as TIFF (`gdal_translate in.jp2 out.tif`)"),
    (0, b"\xff\x4f\xff\x51", "is JPEG 2000", "save it as TIFF (`gdal_translate in.j2k out.tif`)"),
    (0, b"\xff\x0a", "is JPEG XL", "save it as JPEG or PNG (`djxl in.jxl out.png`)"),
    (0, b"\0\0\0\x0cJXL ", "is JPEG XL", "save it as JPEG or PNG (`djxl in.jxl out.png`)"),
    (4, b"ftypavi", "is AVIF", "save it as JPEG or PNG (`avifdec in.avif out.png`)"),
    (4, b"ftypcrx", "is a camera's raw file (CR3)", "develop it to JPEG or 16-bit TIFF"),
    (4, b"ftypmp4", "is a video", "save its frames as PNG or JPEG"),
    (4, b"ftypisom", "is a video", "save its frames as PNG or JPEG"),
    (4, b"ftyp", "is HEIC, as phones write it", "save it as JPEG (`heif-convert photo.heic photo.jpg`)"),
    (0, b"FUJIFILMCCD-RAW", "is a camera's raw file (RAF)", "develop it to JPEG or 16-bit TIFF"),
    (0, b"IIRO", "is a camera's raw file (ORF)", "develop it to JPEG or 16-bit TIFF"),
    (0, b"IIU\0", "is a camera's raw file (RW2)", "develop it to JPEG or 16-bit TIFF"),
    (8, b"CR", "is a camera's raw file (CR2)", "develop it to JPEG or 16-bit TIFF"),
)
"""(offset, bytes there, what such a file is, what to do); tried in this order."""
_TEXT_KINDS = (
    (re.compile(rb"<!doctype html|<html", re.I), "is a web page, not an image", f"the download has failed: {AGAIN}"),
    (re.compile(rb"<\?xml|<svg|<annotation", re.I), "is XML (SVG, or annotations), not an image", _AS_PNG),
    (
        re.compile(rb"[{\[]"),
        "is JSON, not an image",
        "annotations go under `masks` (LabelMe) or `coco`, photos under `images`",
    ),
)
_LOSSY_TIFF = frozenset({6, 7, 33003, 33004, 33005, 34712, 34887, 34933, 34934, 50001, 50002, 52546})
"""TIFF compressions that may change values: JPEG, JPEG 2000, LERC, WebP, JPEG XL."""
_RAW_SUFFIXES = frozenset(
    {".dng", ".cr2", ".cr3", ".nef", ".nrw", ".arw", ".srf", ".sr2", ".orf", ".rw2", ".pef", ".raf"}
)
_DNG_VERSION = 50706
_RAW_PHOTOMETRIC = (32803, 34892)  # colour filter array, linear raw


class UnreadableError(DataError):
    """A file is no image that can be read."""

    def __init__(self, found: str, remedy: str) -> None:
        super().__init__(f"{found}; {remedy}.")
        self.found = found
        """What must hold and what was found, a sentence that begins with `the file`."""
        self.remedy = remedy

    # By default an exception is unpickled by passing its message to its class, but this class takes two texts.
    def __reduce__(self) -> tuple[type["UnreadableError"], tuple[str, str]]:
        return UnreadableError, (self.found, self.remedy)


@dataclass(frozen=True, slots=True)
class Raster:
    """What an image file holds, as stored: H rows, W columns, C samples a pixel."""

    format: str
    """JPEG, PNG, TIFF, BMP, WebP, GIF or PNM."""
    samples: NDArray[Any]
    """(H, W, C) of unsigned or signed integers or floats, without alpha. Of a palette image the indices, C = 1."""
    white: int | None
    """Largest value that a sample can have: 255, 15 in a PNG of 4 bits. None for signed integers and floats."""
    alpha: NDArray[Any] | None = None
    """(H, W) alpha, or what the file says is one; None where there is none, or all of it is opaque."""
    palette: NDArray[np.uint8] | None = None
    """(N, 3) RGB colours that the indices mean; None where samples are values."""
    orientation: int = 1
    """EXIF orientation, 1..8; 1 is upright. Samples are not turned."""
    lossy: bool = False
    """Whether the format may have changed values: no file for masks."""
    inverted: bool = False
    """Whether 0 is white, as fax TIFFs have it."""

    @property
    def words(self) -> str:
        """What it is, in words: `a TIFF of 5 bands of 16 bits`."""
        dtype, count = self.samples.dtype, self.samples.shape[2]
        kind = "a palette" if self.palette is not None else {1: "a grey", 3: "an RGB"}.get(count, "a")
        bands = "" if kind != "a" else f" of {count} bands"
        depth = f" of {dtype.itemsize * 8} bits" if dtype.kind == "u" else f" of {dtype}"
        return f"{kind} {self.format}{bands}{depth}{' with alpha' if self.alpha is not None else ''}"


def turned(pixels: NDArray[Any], orientation: int) -> NDArray[Any]:
    """Returns pixels (H, W) or (H, W, C) that are stored with an EXIF orientation, 1..8, the right way up."""
    # Transposing comes first: the mirroring below is that of the rows and columns one sees.
    if orientation >= 5:
        pixels = pixels.swapaxes(0, 1)
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return np.ascontiguousarray(pixels)


def open_raster(data: bytes, name: str = "") -> Raster:
    """Decodes an image file from its bytes; `name`, of which the suffix counts, helps to say what an unreadable file is.

    Raises UnreadableError if the bytes are no image of a format that is read, are damaged, have several pages or frames, or
    more pixels than Pillow's limit.
    """
    if not data:
        raise UnreadableError("the file is empty", AGAIN)
    suffix = PurePath(name).suffix.lower()
    if suffix in _RAW_SUFFIXES:
        raise UnreadableError(f"the file is a camera's raw file ({suffix})", "develop it to JPEG or 16-bit TIFF")
    decode = _decoder(data)
    if decode is None:
        raise UnreadableError(*_what_it_is(data))
    try:
        return decode(data)
    except UnreadableError:
        raise
    except Image.DecompressionBombError:
        raise _too_large() from None
    except MemoryError:
        raise UnreadableError("the file needs more memory than there is", "cut it into tiles") from None
    # Decoders of third parties trip over damaged bytes in any way: TypeError, KeyError, cv2.error and others were seen.
    except Exception as error:
        # Pillow names the memory that it reads from.
        reason = " ".join(re.sub(r"<_io\.BytesIO[^>]*>", "", str(error)).split())[:120]
        raise UnreadableError(f"the file cannot be decoded ({type(error).__name__}: {reason})", _DAMAGED) from None


def upright_size(data: bytes, name: str = "") -> tuple[tuple[int, int], int]:
    """Returns (height, width) in px of an image as it is seen, and its EXIF orientation, without decoding pixels where it can.

    Raises UnreadableError as `open_raster` does for what its header shows.
    """
    try:
        if data.startswith(b"\xff\xd8"):
            with Image.open(io.BytesIO(data)) as image:
                (width, height), orientation = image.size, _orientation(image.info.get("exif"))
        elif data.startswith(_PNG):
            chunks = dict(_png_chunks(data))
            width, height = struct.unpack(">II", chunks[b"IHDR"][:8])
            orientation = _orientation(chunks.get(b"eXIf"))
        else:
            raster = open_raster(data, name)
            (height, width), orientation = raster.samples.shape[:2], raster.orientation
    except UnreadableError:
        raise
    except Exception:
        raise UnreadableError("the file has a header that cannot be read", _DAMAGED) from None
    return ((height, width) if orientation < 5 else (width, height)), orientation


_DAMAGED = f"it is damaged, or of a rare kind: {AGAIN}, or {_AS_PNG}"


def _decoder(data: bytes) -> Callable[[bytes], Raster] | None:
    if data.startswith(b"\xff\xd8"):
        return _decode_jpeg
    if data.startswith(_PNG):
        return _decode_png
    if data.startswith(_TIFF) and data[8:10] != b"CR":
        return _decode_tiff
    if data.startswith(b"BM"):
        return _decode_bmp
    if data.startswith((b"GIF87a", b"GIF89a")) or (data[:4] == b"RIFF" and data[8:12] == b"WEBP"):
        return _decode_by_pillow
    if re.match(rb"P[56][\s#]", data):
        return _decode_pnm
    return None


def _what_it_is(data: bytes) -> tuple[str, str]:
    """Returns what a file without a decoder is, and what to do."""
    for offset, magic, what, remedy in _FOREIGN:
        if data[offset : offset + len(magic)] == magic:
            return f"the file {what}", remedy
    head = data[:512].lstrip(b"\xef\xbb\xbf \t\r\n")
    for pattern, what, remedy in _TEXT_KINDS:
        if pattern.match(head):
            return f"the file {what}", remedy
    if any(magic.startswith(data) for magic in (_PNG, *_TIFF, b"GIF89a", b"RIFF")):
        return f"the file is cut short ({len(data)} bytes)", AGAIN
    if re.match(rb"P[1-47]\s", data):
        return "the file is PNM of a rare kind (ASCII, bits or PAM)", _AS_PNG
    begins = f"{len(data)} bytes, the first are {bytes(data[:8])!r}"
    return f"the file is no image that is known ({begins})", f"{AGAIN}, or save it as JPEG, PNG or TIFF"


def _too_large() -> UnreadableError:
    # Pillow only warns above MAX_IMAGE_PIXELS; it raises above twice that.
    limit = 2 * (Image.MAX_IMAGE_PIXELS or 0)
    return UnreadableError(
        f"the file must have at most {limit / 1e6:.0f} million px, but has more", "cut it into tiles"
    )


def _check_size(width: int, height: int, samples: int = 1) -> None:
    """Raises UnreadableError before anything is decoded, if a header promises too much or nothing."""
    if width < 1 or height < 1 or samples < 1:
        raise UnreadableError(f"the file says that it has {width}x{height} px", _DAMAGED)
    if width * height * max(1, samples / 16) > 2 * (Image.MAX_IMAGE_PIXELS or 2**62):
        raise _too_large()


def _orientation(exif: bytes | None) -> int:
    """Returns the orientation in EXIF bytes, 1..8; 1 without the tag, or if its value is none of these.

    XMP is not asked, as Pillow would: training decodes by OpenCV, which does not ask it either.
    """
    if not exif:
        return 1
    tags = Image.Exif()
    try:
        tags.load(exif)
    except Exception:  # damaged EXIF is no EXIF
        return 1
    value = tags.get(ExifTags.Base.Orientation, 1)
    return value if value in range(1, 9) else 1


def _planes(values: NDArray[Any]) -> NDArray[Any]:
    return values[..., None] if values.ndim == 2 else values


def _without_opaque(alpha: NDArray[Any], opaque: int) -> NDArray[Any] | None:
    return None if (alpha == opaque).all() else alpha


# ------------------------------------------------------------------------------------------------------------ JPEG


def _decode_jpeg(data: bytes) -> Raster:
    with Image.open(io.BytesIO(data)) as header:
        _check_size(*header.size)
        grey, orientation = header.mode == "L", _orientation(header.info.get("exif"))
    # OpenCV refuses a JPEG that was cut short, and training decodes by it.
    flags = (cv2.IMREAD_GRAYSCALE if grey else cv2.IMREAD_COLOR_RGB) | cv2.IMREAD_IGNORE_ORIENTATION
    pixels = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    if pixels is None:
        raise UnreadableError(f"the file cannot be decoded (a JPEG of {len(data)} bytes)", _DAMAGED)
    return Raster("JPEG", _planes(np.asarray(pixels)), 255, orientation=orientation, lossy=True)


# ------------------------------------------------------------------------------------------------------------- PNG


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yields (type, content) of every chunk; raises UnreadableError if one is cut short, or a critical one's checksum is wrong.

    Decoders differ in what damage they let pass: after this check, none is left that changes pixels.
    """
    at = len(_PNG)
    while at + 12 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        end = at + 8 + length
        if end + 4 > len(data):
            break
        content = data[at + 8 : end]
        counts = kind[:1].isupper() or kind in (b"tRNS", b"eXIf")  # a capital: critical
        if counts and zlib.crc32(content, zlib.crc32(kind)) != int.from_bytes(data[end : end + 4], "big"):
            raise UnreadableError(f"the file's {kind.decode('latin-1')!r} part has a wrong checksum", _DAMAGED)
        yield kind, content
        if kind == b"IEND":
            return
        at = end + 4
    raise UnreadableError(f"the file is cut short (a PNG of {len(data)} bytes)", AGAIN)


def _decode_png(data: bytes) -> Raster:
    import imagecodecs

    header, exif, transparent, frames = b"", None, False, 0
    for kind, content in _png_chunks(data):
        if kind == b"IHDR":
            header = content
        elif kind == b"eXIf":
            exif = content
        elif kind == b"tRNS":
            transparent = True
        elif kind == b"fcTL":
            frames += 1
    if len(header) != 13:
        raise UnreadableError("the file has no header", _DAMAGED)
    width, height, bits, color = struct.unpack(">IIBB", header[:10])
    _check_size(width, height)
    if frames > 1:
        raise _pages(frames)
    orientation = _orientation(exif)
    if color == 3:
        return _decode_by_pillow(data, orientation)
    pixels = _planes(imagecodecs.png_decode(data))
    white = 2**bits - 1
    if bits < 8:
        # Decoders stretch 1, 2 and 4 bits to 0..255: ids would change.
        pixels = pixels // np.uint8(255 // white)
        if transparent:  # one value is the transparent one; the alpha beside it keeps 0 and 255
            raise UnreadableError(f"the file is a PNG of {bits} bits with a transparent value", "save it with 8 bits")
    if pixels.shape[2] in (2, 4):
        alpha = _without_opaque(pixels[..., -1], white)
        return Raster("PNG", np.ascontiguousarray(pixels[..., :-1]), white, alpha, None, orientation)
    return Raster("PNG", pixels, white, orientation=orientation)


def _pages(count: int) -> UnreadableError:
    return UnreadableError(f"the file has {count} pages or frames, but must have one", "save each as a file of its own")


# ---------------------------------------------------------------------------------------------- palettes, GIF, WebP


def _decode_by_pillow(data: bytes, orientation: int | None = None) -> Raster:
    with Image.open(io.BytesIO(data)) as image:
        _check_size(*image.size)
        kind = {"WEBP": "WebP"}.get(str(image.format), str(image.format))
        frames = getattr(image, "n_frames", 1)
        if frames > 1:
            raise _pages(frames)
        if orientation is None:
            orientation = _orientation(image.info.get("exif"))
        if kind == "GIF" and image.tile[0][1] != (0, 0, *image.size):
            raise UnreadableError("the file is a GIF whose frame is not its whole picture", _AS_PNG)
        image.load()
        lossy = kind == "WebP" and b"VP8L" not in data[:64] and _lossy_webp(data)
        if image.mode == "P":
            return _palette_raster(kind, image, orientation)
        if image.mode == "1":
            return Raster(kind, np.asarray(image, np.uint8)[..., None], 1, orientation=orientation)
        if image.mode not in ("L", "LA", "RGB", "RGBA"):
            raise UnreadableError(f"the file is a {kind} of a rare kind ({image.mode})", _AS_PNG)
        pixels = _planes(np.asarray(image))
        if image.mode in ("LA", "RGBA"):
            alpha = _without_opaque(pixels[..., -1], 255)
            return Raster(kind, np.ascontiguousarray(pixels[..., :-1]), 255, alpha, None, orientation, lossy)
        return Raster(kind, pixels, 255, orientation=orientation, lossy=lossy)


def _palette_raster(kind: str, image: Image.Image, orientation: int) -> Raster:
    entries = np.array(image.getpalette("RGBA"), np.uint8).reshape(-1, 4)
    transparency = image.info.get("transparency")
    if isinstance(transparency, int) and transparency < len(entries):
        entries[transparency, 3] = 0
    elif isinstance(transparency, bytes):
        entries[: len(transparency), 3] = np.frombuffer(transparency, np.uint8)[: len(entries)]
    indices = np.asarray(image)
    if indices.size and int(indices.max()) >= len(entries):
        found = f"the file's palette has {len(entries)} colours, but a pixel has the index {int(indices.max())}"
        raise UnreadableError(found, _DAMAGED)
    alpha = _without_opaque(entries[:, 3][indices], 255) if (entries[:, 3] < 255).any() else None
    return Raster(kind, indices[..., None], 255, alpha, entries[:, :3].copy(), orientation)


def _lossy_webp(data: bytes) -> bool:
    """Returns whether a WebP holds a lossy picture; its parts are walked, because an extended file has others before it."""
    at = 12
    while at + 8 <= len(data):
        kind, length = struct.unpack_from("<4sI", data, at)
        if kind in (b"VP8 ", b"VP8L"):
            return bool(kind == b"VP8 ")
        at += 8 + length + length % 2
    return True


# ------------------------------------------------------------------------------------------------------- BMP, PNM


def _decode_bmp(data: bytes) -> Raster:
    first, header, width, height, _, bits, compression = struct.unpack_from("<IIiiHHI", data, 10)
    if header >= 40 and compression == 0:
        needed = first + (abs(width) * bits + 31) // 32 * 4 * abs(height)
        # Without a checksum, a damaged width would give another picture.
        if not needed <= len(data) <= needed + 4:
            found = f"the file says {abs(width)}x{abs(height)} px of {bits} bits, {needed} bytes, but has {len(data)}"
            raise UnreadableError(found, _DAMAGED)
    return _decode_by_pillow(data)


def _decode_pnm(data: bytes) -> Raster:
    # Not Pillow, which scales values to 0..255 wherever the largest is another, and so changes ids.
    header = re.match(rb"P([56])" + rb"(?:\s|#[^\n]*\n)+(\d{1,9})" * 3 + rb"\s", data)
    if not header:
        raise UnreadableError("the file has no header of a PGM or PPM", _DAMAGED)
    kind, width, height, white = (int(number) for number in header.groups())
    samples = 3 if kind == 6 else 1
    _check_size(width, height, samples)
    dtype = np.dtype(np.uint8 if white < 256 else ">u2")
    pixels = data[header.end() :]
    needed = width * height * samples * dtype.itemsize
    if not 0 < white < 65536 or not needed <= len(pixels) <= needed + 1:
        found = f"the file says {width}x{height} px with values up to {white}, {needed} bytes, but has {len(pixels)}"
        raise UnreadableError(found, _DAMAGED)
    values = np.frombuffer(pixels, dtype, needed // dtype.itemsize).reshape(height, width, samples)
    if values.max() > white:
        raise UnreadableError(f"the file holds values above {white}, its largest by its own header", _DAMAGED)
    return Raster("PNM", values.astype(dtype.newbyteorder("=")), white)


# ------------------------------------------------------------------------------------------------------------ TIFF


def _decode_tiff(data: bytes) -> Raster:
    import tifffile

    with tifffile.TiffFile(io.BytesIO(data)) as file:
        pages = [page for page in file.pages if not _is_aside(page)]
        if _DNG_VERSION in file.pages.first.tags or any(_is_raw(page) for page in _all_pages(file)):
            raise UnreadableError("the file is a camera's raw file", "develop it to JPEG or 16-bit TIFF")
        if len(pages) != 1:
            raise _pages(len(pages))
        images = (file.imagej_metadata or {}).get("images", 1) if file.is_imagej else 1
        if images != 1:
            raise _pages(images)
        return _tiff_page(pages[0])


def _is_aside(page: Any) -> bool:
    """Returns whether a page is an overview, a thumbnail or a mask of transparency, and not the picture."""
    return bool(page.is_reduced or page.is_mask)


def _is_raw(page: Any) -> bool:
    return int(page.photometric or 0) in _RAW_PHOTOMETRIC


def _all_pages(file: Any) -> Iterator[Any]:
    """Yields every page, and those that hang below one: a camera's raw data lies there, beside a preview."""
    for page in file.pages:
        yield page
        yield from page.pages or ()


def _tiff_page(page: Any) -> Raster:
    samples = int(page.samplesperpixel)
    _check_size(page.imagewidth, page.imagelength, samples)
    if page.imagedepth != 1:
        raise _pages(page.imagedepth)
    if page.is_tiled and page.tilewidth * page.tilelength > 4 * (page.imagewidth + 1024) * (page.imagelength + 1024):
        raise UnreadableError(f"the file has tiles of {page.tilewidth}x{page.tilelength} px", _DAMAGED)
    photometric, bits = int(page.photometric), int(page.bitspersample)
    if photometric not in (0, 1, 2, 3, 6):
        name = getattr(page.photometric, "name", str(photometric))
        raise UnreadableError(f"the file is a TIFF of a rare kind ({name})", "save it as RGB")
    expected = page.imagewidth * page.imagelength * samples * bits // 8
    stored = sum(page.databytecounts)
    if page.compression == 1 and stored < expected:
        raise UnreadableError(f"the file should hold {expected} bytes of pixels, but holds {stored}", _DAMAGED)
    if (
        page.dataoffsets
        and max(map(sum, zip(page.dataoffsets, page.databytecounts, strict=True))) > page.parent.filehandle.size
    ):
        raise UnreadableError("the file is cut short (a TIFF whose pixels end behind it)", AGAIN)
    values = page.asarray()
    if values.ndim == 3 and int(page.planarconfig) == 2:  # one plane after the other
        values = np.moveaxis(values, 0, 2)
    values = _planes(values)
    if values.shape != (page.imagelength, page.imagewidth, samples):
        raise UnreadableError(f"the file holds {values.shape} values, but says {samples} a pixel", _DAMAGED)
    if values.dtype == np.bool_:
        values = values.astype(np.uint8)
    values = np.ascontiguousarray(values, values.dtype.newbyteorder("="))
    if values.dtype.kind not in "uif":
        raise UnreadableError(f"the file holds {values.dtype} values", "save it as 8 or 16 bits, or float")
    orientation = page.tags.valueof(274, 1)
    orientation = orientation if orientation in range(1, 9) else 1
    white = 2**bits - 1 if values.dtype.kind == "u" else None
    lossy, inverted = int(page.compression) in _LOSSY_TIFF, photometric == 0
    if photometric == 3:
        palette = np.asarray(page.colormap >> 8, np.uint8).T.copy()
        if samples != 1 or bits > 8 or int(values.max()) >= len(palette):
            raise UnreadableError("the file's palette does not fit its pixels", _DAMAGED)
        return Raster("TIFF", values, 255, None, palette, orientation, lossy)
    # 1: colours are multiplied by it already; 2: they are not; 0: unspecified, so a band.
    if samples in (2, 4) and page.extrasamples and int(page.extrasamples[-1]) in (1, 2):
        alpha = _without_opaque(values[..., -1], white) if white else values[..., -1]
        return Raster("TIFF", np.ascontiguousarray(values[..., :-1]), white, alpha, None, orientation, lossy, inverted)
    return Raster("TIFF", values, white, None, None, orientation, lossy, inverted)
