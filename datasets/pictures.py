"""Which files of a folder are pictures, and a word about those that look like one and are left out."""

import os
from pathlib import Path

from utils.logging import warn_once

IMAGE_SUFFIXES = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".jp2", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".avif",
    ".ppm", ".pgm",
)  # fmt: skip
# Pictures that Pillow does not read.
FOREIGN_SUFFIXES = (".heic", ".heif", ".jxl", ".svg", ".psd", ".raw", ".dng", ".cr2", ".nef", ".arw")


def picture_files(folder: Path) -> list[Path]:
    """The pictures below a folder, sorted; a warning counts and names those that are left out.

    Subfolders count, also those behind symbolic links, but not hidden ones (``.ipynb_checkpoints``).
    """
    found: list[Path] = []
    left_out: list[Path] = []
    visited: set[str] = set()
    for place, folders, names in os.walk(folder, followlinks=True):
        visited.add(os.path.realpath(place))
        for path in (Path(place, name) for name in names if name[0] != "."):
            if is_picture(path) and path.is_file():
                found.append(path)
            elif is_picture(path) or path.suffix.lower() in FOREIGN_SUFFIXES:  # a dangling link, or foreign
                left_out.append(path)
        hidden = [Path(place, name) for name in folders if name[0] == "."]
        left_out += [path for path in hidden if any(map(is_picture, path.iterdir()))]
        # A link to a folder above would be walked for ever.
        folders[:] = [
            name for name in folders if name[0] != "." and os.path.realpath(Path(place, name)) not in visited
        ]
    if left_out:
        first = ", ".join(str(path.relative_to(folder)) for path in sorted(left_out)[:3])
        warn_once(
            f"skipped {len(left_out)} of {len(left_out) + len(found)} pictures in {folder} (unknown format, "
            f"dangling link or hidden folder): {first}" + (", ..." if len(left_out) > 3 else "")
        )
    return sorted(found)


def is_picture(path: Path) -> bool:
    """Whether a file has the suffix of a picture."""
    return path.suffix.lower() in IMAGE_SUFFIXES
