"""What the generated scenes of the demo show: objects with planted co-occurrence of their context.

Some classes have a partner context. In the splits ``train`` and ``test`` such a class is on its partner with
probability ``strength``, so a classifier may learn "water" where the tag says "boat". ``test_shuffled`` has
the same objects as ``test`` in the same places, but draws the context without looking at them: the gap
between the two splits is what the context was worth. Contexts are background in the masks.
"""

import math
import zlib
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from datasets.demo.contexts import CONTEXTS, Camera, blend, develop, paint_context, paint_cover
from datasets.demo.objects import OBJECTS, Pose, paint_object
from utils.build import check_choice, check_number

SPLITS = ("train", "test", "test_shuffled")


@dataclass(frozen=True)
class SceneOptions:
    """What is drawn. An image depends on these options (all but the counts), its split and its index only.

    Args:
        seed: any integer >= 0.
        train: number of images of the split ``train``.
        test: number of images of ``test``, and of ``test_shuffled``.
        image_size: side of the square images in pixels, at least 32.
        classes: object classes in the order of their ids, out of ``objects.OBJECTS``.
        partnered: the classes with a partner context (the one that ``objects.OBJECTS`` calls their home).
        strength: probability that an object of a partnered class is on its partner; 1/6: no preference.
        appearance: share of objects in the colours and texture of their own class; the others wear those of a
            class drawn at random. 1: colour gives the class away; 0: nothing but the shape does.
        empty: share of images without any object.
        max_objects: objects per image, uniform between 1 and this number.
        mixed: probability that a further object draws a class of its own and does not repeat the first one's.
        object_size: range of the larger side of an object as a share of the image side.
        occlusion: probability that something of the ground covers the foot of an object.
        far_context: probability that a second context, drawn at random, lies behind the one objects stand on.
    """

    seed: int = 0
    train: int = 4000
    test: int = 400
    image_size: int = 96
    classes: tuple[str, ...] = ("boat", "sheep", "car", "crab", "penguin", "mushroom")
    partnered: tuple[str, ...] = ("boat", "sheep", "car")
    strength: float = 0.9  # with this and the next a plain classifier is mid-range and paints partners
    appearance: float = 0.8
    empty: float = 0.1
    max_objects: int = 3
    mixed: float = 0.3
    object_size: tuple[float, float] = (0.28, 0.6)
    occlusion: float = 0.3
    far_context: float = 0.25

    def __post_init__(self) -> None:
        for name in ("classes", "partnered", "object_size"):  # lists come from YAML and JSON
            object.__setattr__(self, name, tuple(getattr(self, name)))
        for name in self.classes:
            check_choice("each of classes", name, OBJECTS)
        for name in self.partnered:
            check_choice("each of partnered", name, self.classes)
        for name in ("strength", "appearance", "empty", "mixed", "occlusion", "far_context"):
            check_number(name, getattr(self, name))
        for name, least in {"seed": 0, "train": 0, "test": 0, "image_size": 32, "max_objects": 1}.items():
            check_number(name, getattr(self, name), least, math.inf)
        sizes = self.object_size
        if len(sizes) != 2 or not 0.1 <= sizes[0] <= sizes[1] <= 1 or sizes[0] * self.image_size < 8:
            raise ValueError(
                f"object_size {list(sizes)} must be two shares from 0.1 to 1 and 8 pixels or more"
            )

    def count(self, split: str) -> int:
        """Number of images of a split."""
        return self.train if split == "train" else self.test


class Scene(NamedTuple):
    """One image with all that is known about it."""

    image: np.ndarray  # (H, W, 3) uint8
    mask: np.ndarray  # (H, W) uint8, 0 background
    context_map: np.ndarray  # (H, W) uint8 index into CONTEXTS, 255 above the horizon
    context: str  # the one that objects stand on


def context_given_class(options: SceneOptions) -> np.ndarray:
    """(C, contexts) probability of what an object of each class stands on, in train and test."""
    table = np.full((len(options.classes), len(CONTEXTS)), 1 / len(CONTEXTS))
    for row, name in zip(table, options.classes, strict=True):
        if name in options.partnered:
            row[:] = (1 - options.strength) / (len(CONTEXTS) - 1)
            row[CONTEXTS.index(OBJECTS[name].home)] = options.strength
    return table


def _generator(options: SceneOptions, split: str, index: int, purpose: str) -> np.random.Generator:
    return np.random.default_rng(
        [options.seed, zlib.crc32(split.encode()), index, zlib.crc32(purpose.encode())]
    )


def draw_content(options: SceneOptions, split: str, index: int) -> tuple[str, list[int]]:
    """The context of an image and the classes (0-based, any number of them, may be empty) of its objects.

    First the context, then each class given the context: so every object, the first or a further one, stands
    on its partner with exactly the probability ``strength``.
    """
    joint = context_given_class(options) / len(options.classes)
    share = joint.sum(0)
    rng = _generator(options, split, index, "content")
    context = rng.choice(len(CONTEXTS), p=share)
    if split == "test_shuffled":
        return CONTEXTS[context], draw_content(options, "test", index)[1]
    if rng.random() < options.empty:
        return CONTEXTS[context], []
    given_context = joint[:, context] / share[context]
    draws = rng.choice(len(options.classes), size=options.max_objects, p=given_context)
    own = rng.random(options.max_objects) < options.mixed
    own[0] = True
    count = rng.integers(1, options.max_objects + 1)
    return CONTEXTS[context], [int(k) for k in np.where(own, draws, draws[0])[:count]]


def _draw_pose(options: SceneOptions, ground_from: float, rng: np.random.Generator) -> Pose:
    """A place on the ground; what stands farther away (higher up) is smaller."""
    side = options.image_size
    depth = np.sqrt(rng.uniform())  # more of them near
    row = ground_from + 0.06 + (1.0 - ground_from - 0.06) * depth
    smallest, largest = options.object_size
    extent = smallest + (largest - smallest) * np.clip(0.6 * depth + 0.4 * rng.uniform(), 0, 1)
    return Pose(
        foot=(side * rng.uniform(0.08, 0.92), side * row),
        extent=side * extent,
        stretch=rng.uniform(0.88, 1.14),
        angle=rng.normal(0, 0.10),
        mirrored=bool(rng.random() < 0.5),
    )


def render_scene(options: SceneOptions, split: str, index: int) -> Scene:
    """Image ``index`` of a split: a pure function of its arguments, whatever else has been drawn before."""
    context, classes = draw_content(options, split, index)
    # The shuffled split takes everything but the context from `test`.
    source = "test" if split == "test_shuffled" else split
    rng = _generator(options, source, index, "layout")
    looks_down = rng.random() < 0.2
    camera = Camera(
        size=options.image_size,
        horizon=rng.uniform(-0.9, -0.3) if looks_down else rng.uniform(0.12, 0.42),
        vanishing_point=rng.uniform(-0.3, 0.3),
        light=rng.uniform(-1, 1),
    )
    has_far = bool(rng.random() < options.far_context) and not looks_down
    shore = rng.uniform(0.12, 0.35)
    ground_from = max(camera.horizon + (1 - camera.horizon) * (shore if has_far else 0.08), 0.12)
    poses = sorted((_draw_pose(options, ground_from, rng) for _ in classes), key=lambda pose: pose.foot[1])

    backdrop = _generator(options, split, index, "context")
    others = [name for name in CONTEXTS if name != context]
    far_context = others[backdrop.integers(len(others))] if has_far else None
    scene, context_map = paint_context(context, camera, backdrop, far_context, shore)

    rng = _generator(options, source, index, "objects")
    layers, covers = [], []
    for number, (class_index, pose) in enumerate(zip(classes, poses, strict=True)):
        name = options.classes[class_index]
        # Drawn whether needed or not: what is drawn next must not depend on it.
        foreign = options.classes[rng.integers(len(options.classes))]
        wears = name if rng.random() < options.appearance else foreign
        painter = _generator(options, source, index, f"object {number}")
        layers.append(paint_object(name, OBJECTS[wears].look, pose, camera, painter))
        cover = None
        if rng.random() < options.occlusion:
            painter = _generator(options, source, index, f"cover {number}")
            cover = paint_cover(camera, scene, pose.foot, pose.extent, painter)
            whole = layers[-1][1] > 0.5
            if (whole & (cover[1] <= 0.5)).sum() < 0.5 * whole.sum():  # it would hide what the tag speaks of
                cover = None
        covers.append(cover)

    visible = _visible_parts([layer[1] for layer in layers], [cover and cover[1] for cover in covers])
    mask = np.zeros((options.image_size, options.image_size), np.uint8)
    for number in sorted(visible):  # far to near
        colour, coverage, shadow = layers[number]
        scene = scene * (1 - 0.5 * shadow * (1 - coverage))[..., None]
        scene = blend(scene, colour, coverage)
        if covers[number] is not None:
            scene = blend(scene, *covers[number])
        mask[visible[number]] = classes[number] + 1
    image = develop(scene, camera, _generator(options, source, index, "camera"))
    return Scene(image, mask, context_map, context)


def _visible_parts(coverages: list[np.ndarray], covers: list[np.ndarray | None]) -> dict[int, np.ndarray]:
    """Visible pixels of the objects worth keeping; the nearest one always stays.

    An object of which nearer ones leave too little to recognise is taken out before anything is painted.
    """
    visible: dict[int, np.ndarray] = {}
    for number in reversed(range(len(coverages))):  # near to far
        whole = coverages[number] > 0.5
        taken = np.zeros_like(whole) if covers[number] is None else covers[number] > 0.5
        for nearer in visible:
            taken = taken | (coverages[nearer] > 0.5)
            taken = taken if covers[nearer] is None else taken | (covers[nearer] > 0.5)
        seen = whole & ~taken
        if not visible or seen.sum() >= max(0.4 * whole.sum(), 40):
            visible[number] = seen
    return visible
