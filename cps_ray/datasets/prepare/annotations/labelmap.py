"""`labelmap.txt`, in which CVAT's export of masks says which colour means which class."""

from cps_ray.datasets.prepare.annotations.files import is_name, read_file
from cps_ray.datasets.prepare.annotations.shapes import refused, shown

_MAX_BYTES = 2**20


def read_labelmap(path: str) -> list[tuple[str, tuple[int, int, int]]]:
    """Returns name and (r, g, b) of every class, in order, from lines `name:r,g,b:parts:actions`. BadItemError if it has none."""
    rule, remedy = "label map is unreadable", "export it again as `Segmentation mask 1.1`"
    data = read_file(path)
    try:
        lines = data.decode("utf-8-sig").splitlines() if len(data) <= _MAX_BYTES else []
    except UnicodeDecodeError as error:
        raise refused(rule, path, f"it must be UTF-8, but byte {error.start} is not", "save it as UTF-8") from None
    line_of: dict[str | tuple[int, int, int], int] = {}
    table = []
    for number, line in enumerate(lines, start=1):
        where = f"{path}:{number}"
        if not line.strip() or line.startswith("#"):
            continue
        # From the right: the name may hold colons.
        name, color_text = line.strip().rsplit(":", 3)[:2] if line.count(":") >= 3 else ("", "")
        channels = color_text.split(",")
        if not is_name(name) or len(channels) != 3 or not all(_is_byte(channel) for channel in channels):
            found = f"a line must be name:r,g,b:parts:actions with r, g and b in 0..255, but is {shown(line)}"
            raise refused(rule, where, found, remedy)
        red, green, blue = map(int, channels)
        for value in (name, (red, green, blue)):
            if value in line_of:
                found = f"names and colours must be unique, but {value!r} is in line {line_of[value]} too"
                raise refused(rule, where, found, remedy)
            line_of[value] = number
        table.append((name, (red, green, blue)))
    if not table:
        raise refused(rule, path, f"it must have 1 class a line and at most {_MAX_BYTES} bytes, but has not", remedy)
    return table


def _is_byte(text: str) -> bool:
    text = text.strip()
    return text.isascii() and text.isdigit() and len(text) <= 3 and int(text) <= 255
