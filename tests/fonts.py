"""The smallest fonts that Pillow opens, for tests that need one with certain characters."""

import struct
from pathlib import Path


def write_font(path: Path, characters: str) -> Path:
    """Writes a TrueType font: a box for what it lacks, and for each character a triangle of its own. Returns the path."""
    codes = sorted({ord(character) for character in characters})
    glyphs = [_outline([(100, 0), (100, 700), (500, 700), (500, 0)])]
    glyphs += [_outline([(50, 0), (300, 300 + 400 * n // len(codes)), (550, 0)]) for n in range(len(codes))]
    offsets = [sum(map(len, glyphs[:n])) for n in range(len(glyphs) + 1)]
    groups = b"".join(struct.pack(">III", code, code, n) for n, code in enumerate(codes, start=1))
    count = len(glyphs)
    tables = {
        b"cmap": struct.pack(">HHHHI", 0, 1, 3, 10, 12)
        + struct.pack(">HHIII", 12, 0, 16 + len(groups), 0, len(codes))
        + groups,
        b"glyf": b"".join(glyphs),
        b"head": struct.pack(
            ">IIIIHHqqhhhhHHhhh", 0x10000, 0, 0, 0x5F0F3CF5, 0, 1000, 0, 0, 0, 0, 600, 700, 0, 8, 2, 1, 0
        ),
        b"hhea": struct.pack(
            ">IhhhHhhhhhhhhhhhH", 0x10000, 800, -200, 0, 600, 0, 0, 600, 1, 0, 0, 0, 0, 0, 0, 0, count
        ),
        b"hmtx": struct.pack(">Hh", 600, 50) * count,
        b"loca": b"".join(struct.pack(">I", offset) for offset in offsets),
        b"maxp": struct.pack(">IHHHHHHHHHHHHHH", 0x10000, count, 8, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0),
    }
    head = struct.pack(">IHHHH", 0x10000, len(tables), 64, 2, 48)
    body = b""
    for tag, data in tables.items():
        head += tag + struct.pack(">III", 0, 12 + 16 * len(tables) + len(body), len(data))
        body += data + b"\0" * (-len(data) % 4)
    path.write_bytes(head + body)
    return path


def _outline(points: list[tuple[int, int]]) -> bytes:
    xs, ys = zip(*points, strict=True)
    steps = [struct.pack(">h", b - a) for line in (xs, ys) for a, b in zip((0, *line), line, strict=False)]
    data = struct.pack(">hhhhhHH", 1, min(xs), min(ys), max(xs), max(ys), len(points) - 1, 0) + b"\1" * len(points)
    data += b"".join(steps)
    return data + b"\0" * (-len(data) % 4)
