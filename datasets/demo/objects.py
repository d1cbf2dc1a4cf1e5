"""Paint the objects of the demo scenes: parts with signed distances, negative inside, in object units.

u v: object coordinates (u right, v down, the foot of the object at v = 0, 2 units wide); H W: pixels.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from datasets.demo.contexts import Array, Camera, Rng, blend, jitter, noise

BODY, LIGHT, DARK = 0, 1, 2  # colours of a palette; the body has the texture of its class


class Drawing:
    """The parts of one object from back to front: (distance, colour of the palette, textured)."""

    def __init__(self, u: Array, v: Array) -> None:
        self.u, self.v = u, v
        self.parts: list[tuple[Array, int, bool]] = []

    def add(self, distance: Array, tone: int, textured: bool = False) -> None:
        """Put a part in front of the others."""
        self.parts.append((distance, tone, textured))

    def ellipse(self, cu: float, cv: float, ru: float, rv: float, angle: float = 0.0) -> Array:
        """An ellipse around (cu, cv), turned by an angle."""
        c, s = np.cos(angle), np.sin(angle)
        a, b = (self.u - cu) * c + (self.v - cv) * s, (self.v - cv) * c - (self.u - cu) * s
        return (np.hypot(a / ru, b / rv) - 1) * min(ru, rv)

    def box(self, cu: float, cv: float, ru: float, rv: float, rounding: float) -> Array:
        """A rectangle with rounded corners."""
        a, b = np.abs(self.u - cu) - ru + rounding, np.abs(self.v - cv) - rv + rounding
        return np.hypot(np.maximum(a, 0), np.maximum(b, 0)) + np.minimum(np.maximum(a, b), 0) - rounding

    def polygon(self, *corners: tuple[float, float]) -> Array:
        """A convex polygon, corners clockwise on the screen."""
        distance = np.full(np.broadcast(self.u, self.v).shape, -np.inf, np.float32)
        for (u0, v0), (u1, v1) in zip(corners, corners[1:] + corners[:1], strict=True):
            du, dv = u1 - u0, v1 - v0
            side = ((self.u - u0) * dv - (self.v - v0) * du) / np.hypot(du, dv)
            distance = np.maximum(distance, side)
        return distance

    def limb(self, u0: float, v0: float, u1: float, v1: float, radius: float) -> Array:
        """A line with round ends."""
        du, dv = u1 - u0, v1 - v0
        along = np.clip(((self.u - u0) * du + (self.v - v0) * dv) / (du * du + dv * dv), 0, 1)
        return np.hypot(self.u - u0 - along * du, self.v - v0 - along * dv) - radius


def _boat(draw: Drawing, rng: Rng) -> None:
    mast, lean = rng.uniform(1.35, 1.75), rng.uniform(-0.1, 0.15)
    draw.add(draw.limb(lean, -0.4, lean, -mast, 0.04), DARK)
    draw.add(draw.polygon((lean + 0.07, -mast), (lean + 0.8, -0.52), (lean + 0.07, -0.52)), LIGHT)
    if rng.random() < 0.6:
        jib = draw.polygon((lean - 0.07, -mast + 0.25), (lean - 0.07, -0.52), (lean - 0.6, -0.52))
        draw.add(jib, LIGHT)
    hull = draw.polygon((-1.0, -0.5), (1.0, -0.5), (0.66, 0.0), (-0.76, 0.0))
    draw.add(hull, BODY, textured=True)
    draw.add(np.maximum(hull, draw.v + 0.38), DARK)


def _sheep(draw: Drawing, rng: Rng) -> None:
    head, drop = rng.uniform(0.78, 0.95), rng.uniform(0.0, 0.35)
    for x in (-0.5, -0.3, 0.3, 0.48):
        draw.add(draw.limb(x, -0.5, x + rng.uniform(-0.06, 0.06), -0.04, 0.07), DARK)
    wool = np.minimum(draw.ellipse(-0.05, -0.78, 0.76, 0.46), draw.ellipse(0.3, -0.9, 0.45, 0.38))
    wool = wool + 0.05 * np.sin(9 * np.arctan2(draw.v + 0.78, draw.u) + rng.uniform(0, 6))
    draw.add(wool, BODY, textured=True)
    draw.add(draw.ellipse(head - 0.16, -1.22 + drop, 0.16, 0.07, -0.5), DARK)
    draw.add(draw.ellipse(head, -1.06 + drop, 0.2, 0.29, -0.35), DARK)


def _car(draw: Drawing, rng: Rng) -> None:
    roof, back, front = rng.uniform(0.98, 1.15), rng.uniform(-0.6, -0.35), rng.uniform(0.2, 0.4)
    cabin = draw.polygon((back, -roof), (front, -roof), (front + 0.32, -0.58), (back - 0.22, -0.58))
    top, low = -roof + 0.09, -0.62
    glass = draw.polygon((back + 0.05, top), (front - 0.03, top), (front + 0.2, low), (back - 0.1, low))
    draw.add(cabin, BODY, textured=True)
    draw.add(np.maximum(glass, 0.045 - np.abs(draw.u - (back + front) / 2)), LIGHT)
    draw.add(draw.box(0, -0.4, 1.0, 0.24, 0.12), BODY, textured=True)
    draw.add(draw.box(0.93, -0.46, 0.06, 0.06, 0.03), LIGHT)
    for x in (-0.56, 0.56):
        draw.add(draw.ellipse(x, -0.2, 0.23, 0.23), DARK)
        draw.add(draw.ellipse(x, -0.2, 0.1, 0.1), LIGHT)


def _crab(draw: Drawing, rng: Rng) -> None:
    lift = rng.uniform(0.0, 0.3)
    for side in (-1, 1):
        for k, spread in enumerate((0.62, 0.86, 1.0)):
            knee = -0.42 + 0.08 * k
            draw.add(draw.limb(side * 0.4, -0.38, side * spread, knee, 0.065), DARK)
            foot = side * (spread + 0.05), -0.02 - 0.06 * k
            draw.add(draw.limb(side * spread, knee, *foot, 0.055), DARK)
        draw.add(draw.limb(side * 0.5, -0.55, side * 0.85, -0.8 - lift, 0.085), BODY)
        claw = draw.ellipse(side * 0.82, -1.0 - lift, 0.22, 0.26)
        across = np.abs(draw.u - side * 0.78 + 0.3 * side * (draw.v + 1 + lift))
        gap = 0.06 - across - 2 * np.maximum(draw.v + 1 + lift, 0)
        draw.add(np.maximum(claw, gap), BODY, textured=True)
        draw.add(draw.limb(side * 0.18, -0.7, side * 0.2, -0.95, 0.045), DARK)
        draw.add(draw.ellipse(side * 0.2, -0.97, 0.08, 0.08), LIGHT)
    draw.add(draw.ellipse(0, -0.47, 0.66, 0.36), BODY, textured=True)


def _penguin(draw: Drawing, rng: Rng) -> None:
    turn, flap = rng.uniform(0.0, 0.18), rng.uniform(0.05, 0.5)
    for x in (-0.2, 0.24):
        draw.add(draw.ellipse(x, -0.06, 0.22, 0.09), DARK)
    for side in (-1, 1):
        draw.add(draw.ellipse(side * 0.52, -0.95, 0.12, 0.5, -side * flap), BODY, textured=True)
    draw.add(draw.ellipse(0, -0.85, 0.52, 0.82), BODY, textured=True)
    draw.add(draw.ellipse(0, -1.68, 0.33, 0.31), BODY, textured=True)
    draw.add(draw.ellipse(turn, -0.76, 0.34, 0.64), LIGHT)
    draw.add(draw.ellipse(0.1 + turn, -1.66, 0.17, 0.17), LIGHT)
    draw.add(draw.polygon((0.2 + turn, -1.72), (0.58 + turn, -1.6), (0.2 + turn, -1.54)), DARK)


def _mushroom(draw: Drawing, rng: Rng) -> None:
    width, rise, edge = rng.uniform(0.8, 1.0), rng.uniform(0.6, 0.9), rng.uniform(-0.85, -0.65)
    draw.add(draw.polygon((-0.2, edge), (0.2, edge), (0.3, 0.0), (-0.3, 0.0)), LIGHT)
    draw.add(draw.limb(-0.24, edge + 0.2, 0.24, edge + 0.2, 0.06), DARK)
    cap = np.maximum(draw.ellipse(0, edge, width, rise), draw.v - edge - 0.08)
    draw.add(cap, BODY, textured=True)
    for _ in range(rng.integers(4, 8)):
        angle, reach = rng.uniform(0, np.pi), rng.uniform(0.1, 0.8)
        place = width * reach * np.cos(angle), edge - 0.06 - rise * reach * np.sin(angle)
        draw.add(np.maximum(draw.ellipse(*place, 0.13, 0.11), cap), LIGHT)


def _planks(u: Array, v: Array, rng: Rng) -> Array:
    return 0.22 * (np.mod(v * 7 + rng.uniform(), 1) < 0.25) * -1.0 + 0.06 * noise(0.8, u * 20, v * 90, rng)


def _curls(u: Array, v: Array, rng: Rng) -> Array:
    return 0.13 * noise(1.0, u * 34, v * 34, rng)


def _gloss(u: Array, v: Array, rng: Rng) -> Array:
    bands = 0.30 * np.exp(-(((v + 0.55) / 0.09) ** 2)) + 0.18 * np.exp(-(((v + 0.98) / 0.12) ** 2))
    return bands - 0.1 * (v > -0.3)


def _speckles(u: Array, v: Array, rng: Rng) -> Array:
    return -0.32 * (noise(0.6, u * 55, v * 55, rng) > 0.9) + 0.08 * noise(1.4, u * 30, v * 30, rng)


def _feathers(u: Array, v: Array, rng: Rng) -> Array:
    return 0.09 * noise(0.7, u * 75, v * 22, rng)


def _ribs(u: Array, v: Array, rng: Rng) -> Array:
    return 0.12 * np.sin(u * 9 + rng.uniform(0, 6)) * (v < -0.2) + 0.04 * noise(1.0, u * 40, v * 40, rng)


@dataclass(frozen=True)
class Look:
    """Class-typical colours, several to choose from for the body, and the texture of the body.

    ``texture`` gives (H, W) offsets of the brightness around 0.
    """

    body: tuple[tuple[float, float, float], ...]
    light: tuple[float, float, float]
    dark: tuple[float, float, float]
    texture: Callable[[Array, Array, Rng], Array]


@dataclass(frozen=True)
class ObjectClass:
    """How one class is drawn, the context that it is at home on, and half its width and its height."""

    draw: Callable[[Drawing, Rng], None]
    home: str
    extent: tuple[float, float]  # in object units
    look: Look


_WOOD = Look(((0.55, 0.22, 0.12), (0.62, 0.36, 0.16)), (0.93, 0.90, 0.80), (0.30, 0.17, 0.10), _planks)
_WOOL = Look(((0.86, 0.82, 0.72), (0.78, 0.74, 0.66)), (0.70, 0.66, 0.60), (0.15, 0.12, 0.11), _curls)
_PAINTS = ((0.12, 0.22, 0.62), (0.10, 0.42, 0.62), (0.40, 0.12, 0.50))
_METAL = Look(_PAINTS, (0.66, 0.78, 0.84), (0.08, 0.08, 0.09), _gloss)
_SHELL = Look(((0.85, 0.33, 0.10), (0.90, 0.46, 0.14)), (0.98, 0.90, 0.70), (0.62, 0.20, 0.08), _speckles)
_PLUMAGE = Look(((0.10, 0.11, 0.15), (0.20, 0.22, 0.28)), (0.95, 0.95, 0.93), (0.93, 0.60, 0.12), _feathers)
_CAP = Look(((0.72, 0.08, 0.10), (0.80, 0.14, 0.30)), (0.96, 0.92, 0.84), (0.72, 0.62, 0.48), _ribs)

OBJECTS: dict[str, ObjectClass] = {
    "boat": ObjectClass(_boat, "water", (1.0, 1.75), _WOOD),
    "sheep": ObjectClass(_sheep, "grass", (1.05, 1.35), _WOOL),
    "car": ObjectClass(_car, "road", (1.0, 1.15), _METAL),
    "crab": ObjectClass(_crab, "sand", (1.08, 1.5), _SHELL),
    "penguin": ObjectClass(_penguin, "snow", (0.75, 2.0), _PLUMAGE),
    "mushroom": ObjectClass(_mushroom, "forest", (1.0, 1.7), _CAP),
}


@dataclass(frozen=True)
class Pose:
    """Where an object stands and how it is turned; lengths in pixels, angles in radians."""

    foot: tuple[float, float]  # column, row
    extent: float  # the larger side of the upright object
    stretch: float
    angle: float
    mirrored: bool


def paint_object(name: str, look: Look, pose: Pose, camera: Camera, rng: Rng) -> tuple[Array, Array, Array]:
    """Draw one object on an empty canvas.

    Returns:
        (H, W, 3) colours, (H, W) coverage in [0, 1], (H, W) shadow on the ground in [0, 1].
    """
    column, row = camera.grid()
    x, y = (column + 0.5) * camera.size - pose.foot[0], row * camera.size - pose.foot[1]
    half_width, height = OBJECTS[name].extent
    unit = pose.extent / max(2 * half_width, height)
    c, s = np.cos(pose.angle), np.sin(pose.angle)
    u, v = (x * c + y * s) / (unit * pose.stretch), (y * c - x * s) / unit * pose.stretch
    u = -u if pose.mirrored else u
    drawing = Drawing(u, v)
    # Before anything that depends on the look, so that the same object in other colours has the same shape.
    OBJECTS[name].draw(drawing, rng)
    body = jitter(look.body[rng.integers(len(look.body))], rng, 0.05)
    palette = (body, jitter(look.light, rng, 0.04), jitter(look.dark, rng, 0.04))
    texture = look.texture(u, v, rng)
    # Light from one side, and the lower parts darker: enough to make flat shapes look round.
    light = camera.light * (-1 if pose.mirrored else 1)
    across, down = np.clip(u / half_width, -1, 1), np.clip((v + height) / height, 0, 1)
    shade = 1 + 0.22 * light * across - 0.16 * down + 0.08
    colour = np.zeros((camera.size, camera.size, 3))
    coverage = np.zeros((camera.size, camera.size))
    for distance, tone, textured in drawing.parts:
        share = np.clip(0.5 - distance * unit, 0, 1)
        coverage = np.maximum(coverage, share)
        rim = np.clip(1 + distance * unit / 3, 0, 1) * 0.16  # darker towards the outline of each part
        grain = texture if textured else 0.03 * texture
        colour = blend(colour, palette[tone] * (shade - rim)[..., None] + grain[..., None], share)
    lean = x + camera.light * (0.35 * unit + 1.2 * y)  # the shadow falls away from the light
    radius = np.hypot(lean / (1.05 * unit * half_width), (y + 0.03 * unit) / (0.22 * unit))
    return np.clip(colour, 0, 1), coverage, np.clip(1.25 - radius, 0, 1)
