"""A mask over its photo: outlines, names, a legend, and colours that colour-blind people tell apart."""

from collections.abc import Iterable, Sequence
from typing import Any

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

# Colours that colour-blind people tell apart (Okabe and Ito, 2008), without their black.
SAFE_COLOURS = (
    (230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66), (0, 114, 178), (213, 94, 0),
    (204, 121, 167),
)  # fmt: skip
MARGIN = 6  # pixels around the entries of a legend


def safe_colours(class_ids: Iterable[int]) -> dict[int, tuple[int, int, int]]:
    """A colour for each class id from 1: its own, or the next one that no other class of the picture has."""
    chosen: dict[int, tuple[int, int, int]] = {}
    for k in sorted(class_ids):
        first = (k - 1) % len(SAFE_COLOURS)
        order = SAFE_COLOURS[first:] + SAFE_COLOURS[:first]
        chosen[k] = next((colour for colour in order if colour not in chosen.values()), order[0])
    return chosen


def outlined_overlay(image_rgb: np.ndarray, mask: np.ndarray, class_names: Sequence[str]) -> Image.Image:
    """A photo with the outline, colour and name of every class, and a legend of their shares below it.

    Colours are `safe_colours`. Small photos are enlarged and large ones shrunk, so that text is readable.

    Args:
        image_rgb: (H, W, 3) uint8.
        mask: (H, W) integer class ids.
    """
    height, width = mask.shape
    if image_rgb.shape[:2] != mask.shape:
        raise ValueError(f"the photo has {image_rgb.shape[:2]} pixels, its mask {mask.shape}")
    factor = np.clip(max(height, width), 640, 1600) / max(height, width)
    size = max(1, round(width * factor)), max(1, round(height * factor))
    shares = np.bincount(mask.ravel(), minlength=len(class_names)) / mask.size
    image_rgb = cv2.resize(image_rgb, size, interpolation=cv2.INTER_AREA if factor < 1 else cv2.INTER_CUBIC)
    mask = cv2.resize(mask, size, interpolation=cv2.INTER_NEAREST)
    colours = safe_colours(np.flatnonzero(shares[1:]) + 1)
    shown = {k: (mask == k).astype(np.uint8) for k in colours}
    canvas = image_rgb.copy()
    for k, region in shown.items():
        canvas[region > 0] = (0.6 * image_rgb[region > 0] + 0.4 * np.array(colours[k])).round()
    for k, region in shown.items():
        outlines, _ = cv2.findContours(region, cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)
        cv2.drawContours(canvas, outlines, -1, (0, 0, 0), 5, cv2.LINE_AA)
        cv2.drawContours(canvas, outlines, -1, colours[k], 2, cv2.LINE_AA)
    picture = Image.fromarray(canvas)
    font = ImageFont.load_default(max(18, max(size) // 50))
    for k, region in shown.items():
        # The place of the region that is furthest from its edge.
        depth = cv2.distanceTransform(np.pad(region, 1), cv2.DIST_L2, 3)
        y, x = np.unravel_index(depth.argmax(), depth.shape)
        _name_tag(picture, (int(x), int(y)), class_names[k], colours[k], font)
    ranked = sorted(colours, key=lambda k: -shares[k])
    entries = [(f"{class_names[k]} {shares[k]:.1%}", colours[k]) for k in ranked]
    return _with_legend(picture, [*entries, (f"{class_names[0]} {shares[0]:.1%}", None)], font)


def _name_tag(
    picture: Image.Image, place: tuple[int, int], text: str, colour: tuple[int, int, int], font: Any
) -> None:
    """Text on a box of a colour, centred at ``place`` (x, y) as far as the picture allows."""
    draw = ImageDraw.Draw(picture)
    left, top, right, bottom = draw.textbbox((0, 0), text, font)
    half_width, half_height = (right - left) // 2 + 5, (bottom - top) // 2 + 4
    x = min(max(place[0], half_width), max(picture.width - half_width - 1, half_width))
    y = min(max(place[1], half_height), max(picture.height - half_height - 1, half_height))
    draw.rectangle((x - half_width, y - half_height, x + half_width, y + half_height), colour, "black")
    is_dark = np.dot(colour, (0.299, 0.587, 0.114)) < 110
    draw.text((x, y), text, "white" if is_dark else "black", font, anchor="mm")


def _with_legend(
    picture: Image.Image, entries: Sequence[tuple[str, tuple[int, int, int] | None]], font: Any
) -> Image.Image:
    """The picture above lines of coloured squares with text; a colour None is drawn white."""
    side = int(font.size)
    line, widths = side + 2 * MARGIN, [side + 4 * MARGIN + int(font.getlength(text)) for text, _ in entries]
    places, x, y = [], MARGIN, picture.height + MARGIN
    for width in widths:
        if x > MARGIN and x + width > picture.width:
            x, y = MARGIN, y + line
        places.append((x, y))
        x += width
    canvas = Image.new("RGB", (picture.width, y + line), "white")
    canvas.paste(picture)
    draw = ImageDraw.Draw(canvas)
    for (text, colour), (x, y) in zip(entries, places):
        draw.rectangle((x, y, x + side, y + side), colour or "white", "black")
        draw.text((x + side + MARGIN, y + side // 2), text, "black", font, anchor="lm")
    return canvas
