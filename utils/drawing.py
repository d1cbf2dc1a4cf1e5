"""Pictures for people: labels and activation maps over photos, and sheets of them with titles and legends.

Pictures are (H, W, 3) uint8 arrays; masks hold class indices, 255 (ignore) is drawn light grey.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from utils.files import atomic_file
from utils.image import PALETTE

IGNORE_COLOUR = (225, 225, 225)
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
MARGIN, TITLE_SIZE, TEXT_SIZE = 6, 18, 14


class SheetRow(NamedTuple):
    """One line of a sheet."""

    name: str  # written under the pictures
    panels: Sequence[np.ndarray | None]  # one picture per column; None leaves the place empty
    classes: Sequence[int] = ()  # ids for the legend; 255 is called ignored
    note: str = ""  # written behind the name


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


def framed_tiles(pictures: Sequence[np.ndarray], tags: Sequence[int], side: int = 46) -> np.ndarray:
    """Pictures as squares in rows of four, each in a frame of the colour of its tag.

    Tag 0 is drawn white, and a negative one, which is no single class, grey.
    """
    step = side + 10
    canvas = Image.new("RGB", (4 * step, -(-len(pictures) // 4) * step), "white")
    for i, (picture, tag) in enumerate(zip(pictures, tags, strict=True)):
        colour = "white" if tag == 0 else IGNORE_COLOUR if tag < 0 else tuple(PALETTE[tag].tolist())
        tile = Image.fromarray(np.ascontiguousarray(picture)).resize((side, side), Image.Resampling.BILINEAR)
        canvas.paste(ImageOps.expand(tile, 4, colour), (i % 4 * step, i // 4 * step))
    return np.asarray(canvas)


def sheet(
    rows: Sequence[SheetRow], titles: Sequence[str], class_names: Sequence[str], *, width: int = 220
) -> Image.Image:
    """Rows of pictures under column titles, scaled to ``width``, with name and legend below each row."""
    title_font, font = ImageFont.load_default(TITLE_SIZE), ImageFont.load_default(TEXT_SIZE)
    step = width + MARGIN
    tiles = [[_fit(panel, width) for panel in row.panels] for row in rows]
    heights = [max((tile.height for tile in line if tile), default=width) for line in tiles]
    caption = TEXT_SIZE + 3 * MARGIN
    size = (MARGIN + step * len(titles), TITLE_SIZE + 4 * MARGIN + sum(heights) + caption * len(rows))
    canvas = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(canvas)
    for column, title in enumerate(titles):
        draw.text((MARGIN + column * step + width // 2, MARGIN), title, "black", title_font, anchor="ma")
    y = TITLE_SIZE + 3 * MARGIN
    for row, line, height in zip(rows, tiles, heights, strict=True):
        for column, tile in enumerate(line):
            if tile:
                canvas.paste(tile, (MARGIN + column * step, y))
        y += height + MARGIN
        x = _text(draw, MARGIN, y, f"{row.name}   {row.note}".strip(), font) + 4 * MARGIN
        for k in row.classes:
            text = "ignored" if k == 255 else class_names[k]
            entry = TEXT_SIZE + MARGIN + draw.textlength(text, font)
            if x + entry > canvas.width:
                draw.text((x, y), "...", "black", font)
                break
            colour = IGNORE_COLOUR if k == 255 else tuple(PALETTE[k].tolist())
            draw.rectangle((x, y + 1, x + TEXT_SIZE, y + 1 + TEXT_SIZE), colour, "black")
            x = _text(draw, x + TEXT_SIZE + MARGIN, y, text, font) + 3 * MARGIN
        y += caption - MARGIN
    return canvas


def write_picture(path: Path, picture: Image.Image | np.ndarray) -> None:
    """Write a picture as JPEG or PNG by the suffix of its path; a reader never sees half a file."""
    image = Image.fromarray(picture) if isinstance(picture, np.ndarray) else picture
    with atomic_file(path) as file:
        image.save(file, "PNG" if path.suffix.lower() == ".png" else "JPEG", quality=92)


def _fit(panel: np.ndarray | None, width: int) -> Image.Image | None:
    if panel is None:
        return None
    image = Image.fromarray(np.ascontiguousarray(panel))
    return image.resize((width, max(1, round(image.height * width / image.width))), Image.Resampling.BILINEAR)


def _text(draw: ImageDraw.ImageDraw, x: float, y: float, text: str, font: Font) -> float:
    draw.text((x, y), text, "black", font)
    return x + draw.textlength(text, font)
