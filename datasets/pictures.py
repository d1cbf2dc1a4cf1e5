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


def picture_files(folder: Path, subfolders: bool = True) -> list[Path]:
    """The pictures in a folder, sorted; a warning counts and names those that are left out.

    Args:
        subfolders: whether folders below count too, also those behind symbolic links. Hidden ones
            (``.ipynb_checkpoints``) never do.
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
        used = [name for name in folders if subfolders and name[0] != "."]
        unread = [Path(place, name) for name in folders if name not in used]
        left_out += [path for path in unread if any(map(is_picture, path.iterdir()))]
        # A link to a folder above would be walked for ever.
        folders[:] = [name for name in used if os.path.realpath(Path(place, name)) not in visited]
    if left_out:
        first = ", ".join(str(path.relative_to(folder)) for path in sorted(left_out)[:3])
        warn_once(
            f"skipped {len(left_out)} of {len(left_out) + len(found)} pictures in {folder} (unknown format, "
            f"dangling link, hidden folder or subfolder): {first}" + (", ..." if len(left_out) > 3 else "")
        )
    return sorted(found)


def is_picture(path: Path) -> bool:
    """Whether a file has the suffix of a picture."""
    return path.suffix.lower() in IMAGE_SUFFIXES
