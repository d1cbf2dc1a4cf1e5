"""Paint the ground and sky that objects of the demo scenes are on, as the camera shows them.

Everything is drawn at the output size with analytic anti-aliasing, colours are float RGB in [0, 1], and all
randomness is that of the generator that a function gets. H W: pixels.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np

Array = np.ndarray
Rng = np.random.Generator

CONTEXTS = ("water", "grass", "road", "sand", "snow", "forest")


@cache
def noise_tile(exponent: float) -> Array:
    """(256, 256) tileable noise, zero mean and unit variance; amplitude falls as frequency ** -exponent."""
    size = 256
    rng = np.random.default_rng([17, int(exponent * 100)])
    frequency = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.fftfreq(size)[None]) * size
    frequency[0, 0] = np.inf
    # Below 3 periods per tile there would be one dominating blob that every image shares.
    spectrum = np.fft.fft2(rng.standard_normal((size, size))) / np.maximum(frequency, 3.0) ** exponent
    spectrum[0, 0] = 0
    tile = np.fft.ifft2(spectrum).real
    return (tile / tile.std()).astype(np.float32)


def noise(exponent: float, x: Array, y: Array, rng: Rng) -> Array:
    """Noise at the positions x, y (real numbers, in texels of the tile), from a random place of the tile."""
    tile = noise_tile(exponent)
    x, y = np.broadcast_arrays(x + rng.uniform(0, 256), y + rng.uniform(0, 256))
    x0, y0 = np.floor(x), np.floor(y)
    fx, fy = (x - x0).astype(np.float32), (y - y0).astype(np.float32)
    x0, y0 = x0.astype(np.int64) & 255, y0.astype(np.int64) & 255
    x1, y1 = (x0 + 1) & 255, (y0 + 1) & 255
    top = tile[y0, x0] * (1 - fx) + tile[y0, x1] * fx
    bottom = tile[y1, x0] * (1 - fx) + tile[y1, x1] * fx
    return top * (1 - fy) + bottom * fy


def blend(first: Array, second: Array, share: Array) -> Array:
    """Mix two colours or colour images by a (H, W) map of shares, clipped to [0, 1]."""
    share = np.clip(share, 0, 1)[..., None]
    return np.asarray(first, np.float32) * (1 - share) + np.asarray(second, np.float32) * share


def jitter(colour: tuple[float, ...] | Array, rng: Rng, amount: float = 0.06) -> Array:
    """A colour moved by a common brightness and an individual offset per channel."""
    moved = np.asarray(colour) * rng.uniform(1 - 2 * amount, 1 + 2 * amount) + rng.uniform(-amount, amount, 3)
    return np.clip(moved, 0.02, 1).astype(np.float32)


@dataclass(frozen=True)
class Camera:
    """Where the camera looks and where the light comes from.

    Args:
        size: side of the image in pixels.
        horizon: its row as a share of the height; negative: above the image, the camera looks down.
        vanishing_point: its column, -0.5 .. 0.5 of the width.
        light: -1 from the left .. 1 from the right.
    """

    size: int
    horizon: float
    vanishing_point: float
    light: float

    def grid(self) -> tuple[Array, Array]:
        """Column in -0.5 .. 0.5 as (1, W) and row in 0 .. 1 as (H, 1)."""
        steps = (np.arange(self.size, dtype=np.float32) + 0.5) / self.size
        return steps[None] - 0.5, steps[:, None]

    def ground(self) -> tuple[Array, Array, Array]:
        """Sideways (H, W), distance (H, 1) that is 1 at the lower edge, nearness (H, 1) in 0 .. 1."""
        column, row = self.grid()
        height = np.maximum((row - self.horizon) / (1 - self.horizon), 0.06)
        distance = 1 / height
        return (column - self.vanishing_point) * distance, distance, height


def _water(camera: Camera, rng: Rng, sky: Array) -> Array:
    side, distance, near = camera.ground()
    swell = noise(1.3, side * 26, distance * 60, rng)
    ripple = noise(0.8, side * 60, distance * 170, rng)
    deep, pale = jitter((0.07, 0.27, 0.40), rng), jitter((0.28, 0.53, 0.60), rng)
    colour = blend(deep, pale, 0.42 + 0.22 * swell + 0.13 * ripple * near)
    colour = blend(colour, sky, (0.55 - 0.75 * near) + 0 * side)
    return colour + (np.clip(swell + 0.7 * ripple - 1.5, 0, 1) * 0.35 * near)[..., None]


def _grass(camera: Camera, rng: Rng, sky: Array) -> Array:
    side, distance, near = camera.ground()
    column, row = camera.grid()
    patches = noise(1.5, side * 30, distance * 24, rng)
    blades = noise(0.5, column * 150, row * 34, rng) * (0.35 + 0.65 * near)
    blades = blades + 0.5 * noise(0.6, side * 130, distance * 80, rng)
    dark, fresh = jitter((0.16, 0.33, 0.09), rng), jitter((0.46, 0.60, 0.22), rng)
    return blend(dark, fresh, 0.5 + 0.16 * patches + 0.17 * blades)


def _road(camera: Camera, rng: Rng, sky: Array) -> Array:
    side, distance, near = camera.ground()
    grain = noise(0.25, side * 220, distance * 220, rng) * (0.3 + 0.7 * near)
    stains = noise(1.6, side * 26, distance * 14, rng)
    grey = jitter((0.37, 0.37, 0.39), rng, 0.04)
    colour = grey + (0.045 * stains + 0.05 * grain)[..., None]
    paint = jitter((0.86, 0.85, 0.78) if rng.random() < 0.7 else (0.85, 0.70, 0.25), rng, 0.03)
    # One unit of `side` is the image width at the lower edge: lanes of 0.5 to 0.9 of it.
    lane, offset = rng.uniform(0.5, 0.9), rng.uniform(-0.4, 0.4)
    lateral = (side - offset) / lane
    edge = 0.045 / lane * 0.5
    line = np.abs(lateral - np.round(lateral))
    dashed = (np.mod(distance * 1.6 + rng.uniform(), 1.0) < 0.55) | (np.abs(np.round(lateral)) == 1)
    soft = np.clip((edge - line) / (0.012 * distance / lane) + 0.5, 0, 1) * dashed
    soft = soft * (np.abs(np.round(lateral)) <= 1)
    colour = blend(colour, paint, soft * (0.8 + 0.15 * stains))
    slabs = jitter((0.58, 0.56, 0.53), rng, 0.04) + (0.05 * grain + 0.04 * stains)[..., None]
    return blend(colour, slabs, np.clip((np.abs(lateral) - 1.25) * 20, 0, 1))


def _sand(camera: Camera, rng: Rng, sky: Array) -> Array:
    side, distance, near = camera.ground()
    dunes = noise(1.6, side * 22, distance * 18, rng)
    phase = distance * rng.uniform(30, 50) + side * rng.uniform(-14, 14)
    phase = phase + 2.2 * noise(1.4, side * 40, distance * 30, rng)
    grain = noise(0.2, side * 200, distance * 200, rng)
    dark, pale = jitter((0.62, 0.48, 0.29), rng), jitter((0.91, 0.80, 0.58), rng)
    ripples = (0.16 * np.sin(phase) + 0.09 * grain) * np.clip(near * 1.5, 0, 1)
    return blend(dark, pale, 0.55 + 0.14 * dunes + ripples)


def _snow(camera: Camera, rng: Rng, sky: Array) -> Array:
    side, distance, near = camera.ground()
    drifts = noise(1.8, side * 24, distance * 20, rng)
    crust = noise(0.9, side * 90, distance * 110, rng)
    shade, bright = jitter((0.62, 0.71, 0.84), rng, 0.04), jitter((0.94, 0.95, 0.97), rng, 0.02)
    colour = blend(shade, bright, 0.68 + 0.24 * drifts + 0.08 * crust * near)
    sparkle = noise(0.1, side * 230, distance * 230, rng)
    return colour + (np.clip(sparkle - 2.1, 0, 1) * 0.25 * near)[..., None]


def _forest(camera: Camera, rng: Rng, sky: Array) -> Array:
    side, distance, near = camera.ground()
    moss = noise(1.5, side * 30, distance * 26, rng)
    leaves = noise(0.9, side * 120, distance * 120, rng)
    twigs = noise(0.7, side * 60, distance * 200, rng)
    soil, litter = jitter((0.15, 0.11, 0.07), rng, 0.03), jitter((0.50, 0.34, 0.18), rng)
    colour = blend(soil, litter, 0.42 + 0.20 * leaves * (0.4 + 0.6 * near) + 0.10 * twigs)
    return blend(colour, jitter((0.17, 0.27, 0.10), rng, 0.04), 0.5 * moss - 0.05)


_GROUND: dict[str, Callable[[Camera, Rng, Array], Array]] = {
    "water": _water, "grass": _grass, "road": _road, "sand": _sand, "snow": _snow, "forest": _forest,
}  # fmt: skip


def _sky(camera: Camera, rng: Rng) -> Array:
    """(H, W, 3) gradient from the zenith to the pale horizon with clouds; blue, overcast or evening."""
    column, row = camera.grid()
    kinds = (
        ((0.30, 0.52, 0.82), (0.78, 0.87, 0.94)),
        ((0.62, 0.66, 0.71), (0.84, 0.85, 0.86)),
        ((0.42, 0.45, 0.66), (0.95, 0.78, 0.62)),
    )
    zenith, low = kinds[rng.choice(3, p=(0.55, 0.3, 0.15))]
    height = row / max(camera.horizon, 0.2) + 0 * column
    colour = blend(jitter(zenith, rng, 0.04), jitter(low, rng, 0.03), height)
    clouds = noise(1.5, column * 60, row * 130, rng)
    return blend(colour, (0.95, 0.95, 0.95), 0.35 * np.clip(clouds + rng.uniform(-0.8, 0.6), 0, 1.5))


def _backdrop(context: str, camera: Camera, rng: Rng, sky: Array) -> Array:
    """What rises above the horizon: far shore, hills, houses, dunes, mountains, tree trunks."""
    column, row = camera.grid()
    if context == "forest":
        depth = jitter((0.17, 0.22, 0.13), rng, 0.04)
        depth = depth + 0.07 * noise(1.0, column * 90, row * 60, rng)[..., None]
        colour = blend(depth, sky, 0.35 * np.clip(noise(1.1, column * 70, row * 70, rng) - 0.6, 0, 1))
        for _ in range(rng.integers(4, 9)):
            width, place, lean = rng.uniform(0.012, 0.05), rng.uniform(-0.55, 0.55), rng.uniform(-0.06, 0.06)
            across = (column - place - lean * (row - 0.3)) / width
            bark = jitter((0.27, 0.20, 0.14), rng, 0.05) * (1 - 0.35 * across * camera.light)[..., None]
            bark = bark + 0.05 * noise(0.8, column * 200, row * 40, rng)[..., None]
            colour = blend(colour, bark, (1 - np.abs(across)) * width * camera.size + 0.5)
        return colour
    roughness, height, tint = {
        "water": (1.8, 0.03, (0.33, 0.40, 0.40)),
        "grass": (1.6, 0.07, (0.24, 0.36, 0.20)),
        "road": (0.0, 0.16, (0.50, 0.46, 0.43)),
        "sand": (2.0, 0.06, (0.72, 0.60, 0.42)),
        "snow": (1.3, 0.13, (0.68, 0.74, 0.82)),
    }[context]
    if context == "road":
        houses = np.repeat(rng.uniform(0.15, 1.0, 24), rng.integers(2, 7, 24))[: camera.size // 2]
        steps = np.interp(np.arange(camera.size), np.linspace(0, camera.size, len(houses)), houses)[None]
        skyline = height * steps
        colour = jitter(tint, rng, 0.07) + 0 * sky
        windows = (np.mod(row * camera.size, 5) < 2) & (np.mod(column * camera.size, 4) < 2)
        colour = colour - 0.12 * windows[..., None]
    else:
        skyline = height * (0.8 + 0.5 * noise(roughness, column * 60, np.zeros_like(column), rng))
        colour = jitter(tint, rng) + 0.05 * noise(1.0, column * 110, row * 140, rng)[..., None]
        colour = blend(colour, sky, 0.35 + 0 * skyline + 0 * row)  # haze
    above = (row - camera.horizon + np.maximum(skyline, 0)) * camera.size + 0.5
    return blend(sky, colour, above)


def paint_context(
    context: str, camera: Camera, rng: Rng, far_context: str | None = None, shore: float = 0.0
) -> tuple[Array, Array]:
    """A scene without objects.

    Args:
        far_context: a second context that takes over beyond a wavy line; None: there is only one.
        shore: where that line is, as a share of the ground from the horizon to the lower edge.

    Returns:
        (H, W, 3) colours, and the (H, W) integer map of contexts: index into CONTEXTS, 255 above the horizon.
    """
    column, row = camera.grid()
    sky = _sky(camera, rng)
    behind = far_context or context
    colour = _backdrop(behind, camera, rng, sky)
    ground = _GROUND[context](camera, rng, sky)
    index = np.full((camera.size, camera.size), CONTEXTS.index(context), np.uint8)
    if far_context is not None:
        far = _GROUND[far_context](camera, rng, sky)
        line = camera.horizon + (1 - camera.horizon) * shore + 0.02 * noise(1.6, column * 50, 0 * column, rng)
        ground = blend(far, ground, (row - line) * camera.size * 0.5 + 0.5)
        index[np.broadcast_to(row < line, index.shape)] = CONTEXTS.index(far_context)
    colour = blend(colour, ground, (row - camera.horizon) * camera.size + 0.5 + 0 * column)
    index[np.broadcast_to(row < camera.horizon, index.shape)] = 255
    return colour, index


def paint_cover(
    camera: Camera, colour: Array, foot: tuple[float, float], extent: float, rng: Rng
) -> tuple[Array, Array]:
    """Something of the same ground in front of an object: a tuft, wave, mound or drift at its foot.

    Args:
        colour: (H, W, 3) the scene without objects; its own texture, moved, makes the cover.

    Returns:
        (H, W, 3) colours and (H, W) coverage in [0, 1].
    """
    column, row = camera.grid()
    x = (column + 0.5) * camera.size - foot[0] - rng.uniform(-0.35, 0.35) * extent
    y = row * camera.size - foot[1]
    outline = extent * rng.uniform(0.22, 0.42) * np.exp(-((x / (0.45 * extent)) ** 2))
    ragged = 1.5 * noise(0.9, column * 130, 0 * column, rng)
    top = np.where(outline > 1, outline + ragged * np.minimum(1, outline / 3), -3)
    coverage = np.clip(y + top + 0.5, 0, 1) * np.clip(0.06 * extent - y + 0.5, 0, 1)
    shift = int(rng.integers(camera.size // 4, camera.size // 2))
    return np.roll(colour, shift, axis=1) * rng.uniform(0.88, 1.0), coverage


def develop(colour: Array, camera: Camera, rng: Rng) -> Array:
    """Exposure, white balance, vignette, side light and sensor noise of the camera; (H, W, 3) uint8."""
    column, row = camera.grid()
    gain = rng.uniform(0.82, 1.15) * rng.uniform(0.95, 1.05, 3)
    fall = 1 - rng.uniform(0.0, 0.5) * (column**2 + (row - 0.5) ** 2) + 0.12 * camera.light * column
    sigma = rng.uniform(0.008, 0.03)
    exposed = colour * gain * fall[..., None]
    # Shot noise grows with the signal, read-out noise does not.
    exposed = exposed + rng.standard_normal(exposed.shape) * sigma * (0.5 + np.sqrt(np.clip(exposed, 0, 1)))
    return (np.clip(exposed, 0, 1) * 255 + 0.5).astype(np.uint8)
