"""Image files of a folder, by the names that they have in it."""

from pathlib import Path

from cps_ray.errors import DataError

SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".png", ".tif", ".tiff", ".bmp", ".webp", ".gif", ".pnm", ".ppm", ".pgm", ".pbm"}
)


def image_files(folder: Path) -> dict[str, Path]:
    """Returns the image files of a folder and its subfolders by their path in it without suffix; hidden ones are left aside.

    Raises DataError if the folder is none, or if two files differ in their suffix alone.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: must be a folder of images, but there is no such folder.")
    found: dict[str, Path] = {}
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        if (
            path.suffix.lower() in SUFFIXES
            and path.is_file()
            and not any(part.startswith(".") for part in relative.parts)
        ):
            name = relative.with_suffix("").as_posix()
            if name in found:
                raise DataError(f"{path}: must not differ from {found[name].name} in its suffix alone.")
            found[name] = path
    return found
