"""Pictures for people: labels and activation maps over photos.

Pictures are (H, W, 3) uint8 arrays; masks hold class indices, 255 (ignore) is drawn light grey.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from utils.files import atomic_file
from utils.image import PALETTE

IGNORE_COLOUR = (225, 225, 225)


def label_overlay(image_rgb: np.ndarray, mask: np.ndarray, opacity: float = 0.65) -> np.ndarray:
    """Class colours over a photo; background stays photo, ignored pixels become light grey."""
    colours = PALETTE[mask].astype(np.float32)
    colours[mask == 255] = IGNORE_COLOUR
    blended = (1 - opacity) * image_rgb + opacity * colours
    return np.where((mask == 0)[..., None], image_rgb, blended.round()).astype(np.uint8)


def cam_overlay(image_rgb: np.ndarray, cam: np.ndarray, class_ids: Sequence[int]) -> np.ndarray:
    """Each pixel of a grey photo takes the colour of its strongest class, as strong as the CAM (n, H, W).

    Pale grey, because most colours of the VOC palette are dark.
    """
    grey = np.repeat(image_rgb.mean(-1, keepdims=True) * 0.4 + 150, 3, -1)
    if not len(class_ids):
        return grey.round().astype(np.uint8)
    winner, strength = cam.argmax(0), 0.9 * cam.max(0)[..., None].clip(0, 1)
    colours = PALETTE[np.asarray(class_ids)][winner].astype(np.float32)
    return ((1 - strength) * grey + strength * colours).round().astype(np.uint8)


def write_picture(path: Path, picture: Image.Image | np.ndarray) -> None:
    """Write a picture as JPEG or PNG by the suffix of its path; a reader never sees half a file."""
    image = Image.fromarray(picture) if isinstance(picture, np.ndarray) else picture
    with atomic_file(path) as file:
        image.save(file, "PNG" if path.suffix.lower() == ".png" else "JPEG", quality=92)
