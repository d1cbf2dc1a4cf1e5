"""Changes of colour and blur as Pillow makes them, of one picture on the CPU.

N pixels. Grey levels are whole after every step, which allows operations on bytes, and small tables: less
than half of Pillow's time. ``utils.colour`` does the same on a GPU.
"""

from functools import cache

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import Tensor

from utils.colour import HUE

BAND = 2**15  # pixels at a time: what is between two operations stays in the cache


def change_picture(picture: Tensor, change: Tensor) -> Tensor:
    """A picture (3, H, W) uint8 after its change, a table (9, 3) of ``utils.colour``."""
    rgb = picture.flatten(1).numpy().copy()
    bands = [rgb[:, first : first + BAND] for first in range(0, rgb.shape[1], BAND)]
    *steps, (radius, level, _) = change.tolist()
    for step, (first, second, factor) in enumerate(steps):
        if step == HUE and first:
            for band in bands:
                band[:] = turn_hue(band, int(second))
        elif factor != 1:
            mean = int(sum(int(grey(band).sum()) for band in bands) / rgb.shape[1] + 0.5) if second else 0
            for band in bands:
                band[:] = blend(band, grey(band) if first else mean, factor)
    channels = rgb.reshape(picture.shape)
    if radius:
        blur = ImageFilter.GaussianBlur(radius)
        channels = np.stack([Image.fromarray(channel).filter(blur) for channel in channels])
    if level < 256:
        channels = np.where(channels < level, channels, 255 - channels)
    return torch.from_numpy(channels)


def grey(rgb: np.ndarray) -> np.ndarray:
    """Grey levels of colours (3, ...) uint8."""
    red, green, blue = rgb.astype(np.int32)
    return (red * 19595 + green * 38470 + blue * 7471 + 2**15 >> 16).astype(np.uint8)


def blend(rgb: np.ndarray, other: np.ndarray | int, factor: float) -> np.ndarray:
    """``other`` at 0, the colours (3, N) uint8 at 1, and beyond."""
    other, values = np.float32(other), rgb.astype(np.float32)
    values -= other
    values *= np.float32(factor)
    values += other
    return (values.clip(0, 255) if factor > 1 else values).astype(np.uint8)


def turn_hue(rgb: np.ndarray, shift: int) -> np.ndarray:
    """Colours (3, N) uint8 whose hue is shifted by 0 to 255 of 256 levels."""
    hues, saturations, middles = _tables()
    top, hue_index, saturation_index = _indices(rgb)
    hue = hues.take(hue_index) + np.uint8(shift)
    saturation = saturations.take(saturation_index)
    middle = middles.take(hue * np.int32(256) + saturation)
    middle = (middle * top + np.float32(0.5)).astype(np.uint8)
    bottom = (middles.take(saturation) * top + np.float32(0.5)).astype(np.uint8)  # as red has it
    # Where red, green and blue are at the top, and where they are not at the bottom. Numbers wrap around.
    places = [(213, 85, 170, 170), (43, 84, 255, 170), (128, 84, 85, 169)]
    turned = np.empty_like(rgb)
    for channel, (start, length, rise, above) in zip(turned, places, strict=True):
        at_top = (hue - np.uint8(start) <= length).view(np.uint8)
        in_between = (hue - np.uint8(rise) <= above).view(np.uint8)
        np.maximum(top * at_top, middle * in_between, out=channel)
        np.maximum(channel, bottom, out=channel)
    return turned


def _indices(rgb: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The largest channel of colours (3, N) uint8, and where ``_tables`` hold their hue and saturation."""
    red, green, blue = rgb
    higher, lower = np.maximum(red, green), np.minimum(red, green)
    top, middle = np.maximum(higher, blue), np.maximum(lower, np.minimum(higher, blue))
    spread = (top - np.minimum(lower, blue)).astype(np.int32) << 8
    order = (red >= green).view(np.uint8) + 2 * (green >= blue).view(np.uint8)
    order += 4 * (red >= blue).view(np.uint8)
    return top, (order.astype(np.int32) << 16) + spread + (top - middle), spread + top


@cache
def _tables() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pillow's hues and saturations of all colours, and the share of the top in the middle channel."""
    first, second = np.mgrid[:256, :256].astype(np.uint8).reshape(2, -1)
    full, low = np.full_like(first, 255), np.minimum(first, second)
    hues, saturations = np.zeros(2**19, np.uint8), np.zeros(2**16, np.uint8)
    for colours in ([full, first, second], [first, full, second], [first, second, full]):
        hues[_indices(np.stack(colours))[1]] = _hsv(colours)[:, 0]
    shades = [np.maximum(first, second), low, low]
    saturations[_indices(np.stack(shades))[2]] = _hsv(shades)[:, 1]
    place = np.arange(256)[:, None] * 6 / 255
    share = np.where(place // 1 % 2 == 1, place % 1, 1 - place % 1)
    return hues, saturations, (1 - share * np.arange(256) / 255).astype(np.float32).ravel()


def _hsv(colours: list[np.ndarray]) -> np.ndarray:
    return np.array(Image.fromarray(np.stack(colours, -1)[None]).convert("HSV"))[0]
