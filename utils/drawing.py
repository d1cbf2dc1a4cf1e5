"""Pictures for people: labels and activation maps over photos, and sheets of them with titles and legends.

Pictures are (H, W, 3) uint8 arrays; masks hold class indices, 255 (ignore) is drawn light grey.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from utils.files import write_atomic
from utils.image import voc_palette

PALETTE = np.array(voc_palette(), dtype=np.uint8).reshape(256, 3)
IGNORE_COLOUR = (225, 225, 225)
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
MARGIN, TITLE_SIZE, TEXT_SIZE = 6, 18, 14


@dataclass
class SheetRow:
    """One line of a sheet."""

    name: str  # written under the pictures
    panels: list[np.ndarray | None]  # one picture per column; None leaves the place empty
    classes: Sequence[int] = field(default_factory=tuple)  # ids for the legend; 255 is called ignored
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


def tagged_tiles(
    pictures: Sequence[np.ndarray], tags: Sequence[tuple[int, str]], side: int = 46
) -> np.ndarray:
    """Small pictures in rows of four, each in a frame of its tag's colour, with the tag's name below.

    Args:
        pictures: scaled to squares of ``side`` pixels.
        tags: class id and name; id 0 is drawn white, and a negative one, which is no single class, grey.
    """
    columns, frame, line = 4, 4, TEXT_SIZE
    font = ImageFont.load_default(TEXT_SIZE - 3)
    width, height = side + 2 * frame + 2, side + 2 * frame + line
    canvas = Image.new("RGB", (columns * width, -(-len(pictures) // columns) * height), "white")
    draw = ImageDraw.Draw(canvas)
    for i, (picture, (tag, name)) in enumerate(zip(pictures, tags, strict=True)):
        x, y = i % columns * width, i // columns * height
        colour = "white" if tag == 0 else IGNORE_COLOUR if tag < 0 else tuple(int(v) for v in PALETTE[tag])
        draw.rectangle((x, y, x + side + 2 * frame - 1, y + side + 2 * frame - 1), colour)
        tile = Image.fromarray(np.ascontiguousarray(picture)).resize((side, side), Image.Resampling.BILINEAR)
        canvas.paste(tile, (x + frame, y + frame))
        while draw.textlength(name, font) > width - 2 and len(name) > 3:
            name = name[:-2].rstrip(".") + "."
        draw.text((x + frame, y + side + 2 * frame), name, "black", font)
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
    canvas = Image.new(
        "RGB",
        (MARGIN + step * len(titles), TITLE_SIZE + 4 * MARGIN + sum(heights) + caption * len(rows)),
        "white",
    )
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
            colour = IGNORE_COLOUR if k == 255 else tuple(int(v) for v in PALETTE[k])
            draw.rectangle((x, y + 1, x + TEXT_SIZE, y + 1 + TEXT_SIZE), colour, "black")
            x = _text(draw, x + TEXT_SIZE + MARGIN, y, text, font) + 3 * MARGIN
        y += caption - MARGIN
    return canvas


def write_picture(path: Path, picture: Image.Image | np.ndarray) -> None:
    """Write a picture as JPEG or PNG by the suffix of its path; a reader never sees half a file."""
    image = Image.fromarray(picture) if isinstance(picture, np.ndarray) else picture
    buffer = io.BytesIO()
    image.save(buffer, "PNG" if path.suffix.lower() == ".png" else "JPEG", quality=92)
    write_atomic(path, buffer.getvalue())


def _fit(panel: np.ndarray | None, width: int) -> Image.Image | None:
    if panel is None:
        return None
    image = Image.fromarray(np.ascontiguousarray(panel))
    return image.resize((width, max(1, round(image.height * width / image.width))), Image.Resampling.BILINEAR)


def _text(draw: ImageDraw.ImageDraw, x: float, y: float, text: str, font: Font) -> float:
    draw.text((x, y), text, "black", font)
    return x + draw.textlength(text, font)
