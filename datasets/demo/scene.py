"""Generated scenes with planted co-occurrence, in VOC layout: the data of the demo and a small benchmark.

Some classes have a partner context. In the splits ``train`` and ``test`` such a class stands on its partner
with probability ``strength``, so that a classifier may learn "water" where it is told "boat". In
``test_shuffled`` the same objects as in ``test`` stand in the same places, but the context is drawn without
looking at them: the gap between the two splits is what the context was worth. Contexts carry no label; in the
masks they are background.
"""

from __future__ import annotations

import hashlib
import io
import json
import multiprocessing
import os
import shutil
import zlib
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from datasets.demo import scenery
from datasets.demo.scenery import CONTEXTS, OBJECTS
from datasets.lists import write_tags
from datasets.voc import tags_from_xml
from utils.files import read_json, write_atomic, write_json
from utils.image import write_mask
from utils.logging import progress_bar
from utils.worker import start_worker

FORMAT = "tag2mask/synthetic-1"  # a change of what is drawn for the same options needs a new number
SPLITS = ("train", "test", "test_shuffled")
_FOLDERS = ("JPEGImages", "SegmentationClass", "Annotations", "ImageSets")


@dataclass(frozen=True)
class SceneOptions:
    """What is drawn. An image depends on these options (all but the counts), its split and its index only.

    Args:
        seed: any integer >= 0.
        train: number of images of the split ``train``.
        test: number of images of ``test``, and of ``test_shuffled``.
        image_size: side of the square images in pixels, at least 32.
        classes: object classes in the order of their ids, out of ``scenery.OBJECTS``.
        partnered: the classes with a partner context (the one that ``scenery.OBJECTS`` calls their home).
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
    strength: float = 0.9
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
        unknown = [name for name in self.classes if name not in OBJECTS]
        if unknown or not self.classes or len(set(self.classes)) != len(self.classes):
            raise ValueError(
                f"classes {list(self.classes)}: one or more different names out of {', '.join(OBJECTS)}"
            )
        stray = [name for name in self.partnered if name not in self.classes]
        if stray:
            raise ValueError(f"partnered {stray}: not among the classes {list(self.classes)}")
        for name in ("strength", "appearance", "empty", "mixed", "occlusion", "far_context"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}, but must lie in 0 .. 1")
        sizes = self.object_size
        if len(sizes) != 2 or not 0.1 <= sizes[0] <= sizes[1] <= 1 or sizes[0] * self.image_size < 8:
            raise ValueError(
                f"object_size {list(sizes)}: smallest and largest share of the image side, within 0.1 .. 1, "
                f"and no object below 8 pixels (the image has {self.image_size})"
            )
        if self.seed < 0 or self.train < 0 or self.test < 0 or self.image_size < 32 or self.max_objects < 1:
            raise ValueError("seed, train and test must be >= 0, image_size >= 32, max_objects >= 1")

    def count(self, split: str) -> int:
        """Number of images of a split."""
        return self.train if split == "train" else self.test


class SceneObject(NamedTuple):
    """One visible object; ``class_id`` 1..C, ``box`` half-open around its visible pixels."""

    class_id: int
    box: tuple[int, int, int, int]  # x0, y0, x1, y1
    truncated: bool
    occluded: bool


class Scene(NamedTuple):
    """One image with all that is known about it; ``context_map`` is for analysis and is never written."""

    image: np.ndarray  # (H, W, 3) uint8
    mask: np.ndarray  # (H, W) uint8, 0 background
    context_map: np.ndarray  # (H, W) uint8 index into CONTEXTS, 255 above the horizon
    context: str  # the one that objects stand on
    objects: tuple[SceneObject, ...]


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
    if split == "test_shuffled":
        context = _generator(options, split, index, "content").choice(len(CONTEXTS), p=share)
        return CONTEXTS[context], draw_content(options, "test", index)[1]
    rng = _generator(options, split, index, "content")
    context = rng.choice(len(CONTEXTS), p=share)
    if rng.random() < options.empty:
        return CONTEXTS[context], []
    given_context = joint[:, context] / share[context]
    draws = rng.choice(len(options.classes), size=options.max_objects, p=given_context)
    own = rng.random(options.max_objects) < options.mixed
    own[0] = True
    count = rng.integers(1, options.max_objects + 1)
    return CONTEXTS[context], [int(k) for k in np.where(own, draws, draws[0])[:count]]


def _draw_pose(
    options: SceneOptions, camera: scenery.Camera, ground_from: float, rng: np.random.Generator
) -> scenery.Pose:
    """A place on the ground; what stands farther away (higher up) is smaller."""
    side = options.image_size
    depth = np.sqrt(rng.uniform())  # more of them near
    row = ground_from + 0.06 + (1.0 - ground_from - 0.06) * depth
    smallest, largest = options.object_size
    extent = smallest + (largest - smallest) * np.clip(0.6 * depth + 0.4 * rng.uniform(), 0, 1)
    return scenery.Pose(
        foot=(side * rng.uniform(0.08, 0.92), side * row),
        extent=side * extent,
        stretch=rng.uniform(0.88, 1.14),
        angle=rng.normal(0, 0.10),
        mirrored=bool(rng.random() < 0.5),
    )


def render_scene(options: SceneOptions, split: str, index: int) -> Scene:
    """Image ``index`` of a split: a pure function of its arguments, whatever else has been drawn before."""
    if split not in SPLITS:
        raise ValueError(f"split {split!r}: must be one of {', '.join(SPLITS)}")
    context, classes = draw_content(options, split, index)
    # The shuffled split takes everything but the context from `test`.
    source = "test" if split == "test_shuffled" else split
    rng = _generator(options, source, index, "layout")
    looks_down = rng.random() < 0.2
    camera = scenery.Camera(
        size=options.image_size,
        horizon=rng.uniform(-0.9, -0.3) if looks_down else rng.uniform(0.12, 0.42),
        vanishing_point=rng.uniform(-0.3, 0.3),
        light=rng.uniform(-1, 1),
    )
    has_far = bool(rng.random() < options.far_context) and not looks_down
    shore = rng.uniform(0.12, 0.35)
    ground_from = max(camera.horizon + (1 - camera.horizon) * (shore if has_far else 0.08), 0.12)
    poses = sorted(
        (_draw_pose(options, camera, ground_from, rng) for _ in classes), key=lambda pose: pose.foot[1]
    )

    backdrop = _generator(options, split, index, "context")
    others = [name for name in CONTEXTS if name != context]
    far_context = others[backdrop.integers(len(others))] if has_far else None
    scene, context_map = scenery.paint_context(context, camera, backdrop, far_context, shore)

    rng = _generator(options, source, index, "objects")
    layers, covers = [], []
    for number, (class_index, pose) in enumerate(zip(classes, poses, strict=True)):
        name = options.classes[class_index]
        # Drawn whether needed or not: what is drawn next must not depend on it.
        foreign = options.classes[rng.integers(len(options.classes))]
        wears = name if rng.random() < options.appearance else foreign
        painter = _generator(options, source, index, f"object {number}")
        layers.append(scenery.paint_object(name, OBJECTS[wears].look, pose, camera, painter))
        cover = None
        if rng.random() < options.occlusion:
            painter = _generator(options, source, index, f"cover {number}")
            cover = scenery.paint_cover(camera, scene, pose.foot, pose.extent, painter)
            whole = layers[-1][1] > 0.5
            if (whole & (cover[1] <= 0.5)).sum() < 0.5 * whole.sum():  # it would hide what the tag speaks of
                cover = None
        covers.append(cover)

    visible, kept = _visible_parts([layer[1] for layer in layers], [cover and cover[1] for cover in covers])
    mask = np.zeros((options.image_size, options.image_size), np.uint8)
    objects = []
    for number in kept:  # far to near
        colour, coverage, shadow = layers[number]
        scene = scene * (1 - 0.5 * shadow * (1 - coverage))[..., None]
        scene = scenery.blend(scene, colour, coverage)
        if covers[number] is not None:
            scene = scenery.blend(scene, *covers[number])
        mask[visible[number]] = classes[number] + 1
        rows, columns = np.nonzero(visible[number])
        box = (int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1)
        truncated = box[0] == 0 or box[1] == 0 or box[2] == options.image_size or box[3] == options.image_size
        occluded = bool(visible[number].sum() < 0.95 * (coverage > 0.5).sum())
        objects.append(SceneObject(classes[number] + 1, box, truncated, occluded))
    image = scenery.develop(scene, camera, _generator(options, source, index, "camera"))
    return Scene(image, mask, context_map, context, tuple(objects))


def _visible_parts(
    coverages: list[np.ndarray], covers: list[np.ndarray | None]
) -> tuple[dict[int, np.ndarray], list[int]]:
    """Visible pixels per object, and the objects worth keeping; the nearest one always stays.

    An object of which nearer ones leave too little to recognise is taken out before anything is painted.
    """
    visible: dict[int, np.ndarray] = {}
    for number in reversed(range(len(coverages))):  # near to far
        whole = coverages[number] > 0.5
        taken = np.zeros_like(whole) if covers[number] is None else covers[number] > 0.5
        for nearer in visible:
            taken = (
                taken
                | (coverages[nearer] > 0.5)
                | (False if covers[nearer] is None else covers[nearer] > 0.5)
            )
        seen = whole & ~taken
        if not visible or seen.sum() >= max(0.4 * whole.sum(), 40):
            visible[number] = seen
    return visible, sorted(visible)


def write_dataset(
    root: Path,
    options: SceneOptions,
    *,
    overwrite: bool = False,
    workers: int | None = None,
    progress: bool = True,
) -> dict:
    """Write all splits in VOC layout below ``root``, or do nothing where they already are.

    An interrupted run goes on where it stopped. Files appear under their names only when they are complete.

    Args:
        overwrite: replace a set that was generated with other options.
        workers: processes that draw; None: one per core, at most 8.

    Returns:
        The content of ``root/meta.json``: format, options, context probabilities, fingerprint.

    Raises:
        FileExistsError: if ``root`` holds a set made with other options, or files that are no generated set.
    """
    root = Path(root)
    head = {"format": FORMAT, "options": json.loads(json.dumps(asdict(options)))}
    found = read_meta(root)
    if found is None and any((root / folder).exists() for folder in _FOLDERS):
        raise FileExistsError(
            f"{root} holds a data set that was not generated (no meta.json): choose another folder"
        )
    if found is not None and {key: found.get(key) for key in head} != head:
        if not overwrite:
            raise FileExistsError(
                f"{root} was generated with other options ({_changes(found, head)}): "
                "overwrite=true replaces it, out=DIR writes elsewhere"
            )
        # In this order a crash leaves an unfinished set of the old options, never a mixture.
        write_json(root / "meta.json", {key: found[key] for key in head if key in found})
        for folder in ("Annotations", "SegmentationClass", "JPEGImages", "ImageSets"):
            shutil.rmtree(root / folder, ignore_errors=True)
    elif found is not None and found.get("fingerprint"):
        return found
    write_json(root / "meta.json", head)  # before any image, so that an interrupted run is recognised as ours

    images = [(split, index) for split in SPLITS for index in range(options.count(split))]
    missing = [item for item in images if not (root / "Annotations" / f"{image_name(*item)}.xml").exists()]
    parts = [missing[start : start + 50] for start in range(0, len(missing), 50)]
    workers = min(os.cpu_count() or 1, 8) if workers is None else workers
    with progress_bar(total=len(images), desc=f"scenes in {root}", unit="image", disable=not progress) as bar:
        bar.update(len(images) - len(missing))
        for finished in _for_each(parts, root, options, workers):
            bar.update(finished)

    class_names = ("background", *options.classes)
    names = [image_name(*item) for item in images]
    write_tags(root / "tags.csv", tags_from_xml(root / "Annotations", names, class_names))
    for split in SPLITS:
        lines = "".join(f"{image_name(split, index)}\n" for index in range(options.count(split)))
        write_atomic(root / "ImageSets/Segmentation" / f"{split}.txt", lines.encode())
    write_atomic(root / "class_names.txt", "".join(f"{name}\n" for name in class_names).encode())
    table = {
        name: {context: round(float(share), 4) for context, share in zip(CONTEXTS, row, strict=True)}
        for name, row in zip(options.classes, context_given_class(options), strict=True)
    }
    meta = {**head, "context_given_class": table, "fingerprint": _fingerprint(root, images)}
    write_json(root / "meta.json", meta)
    return meta


def read_meta(root: Path) -> dict | None:
    """``meta.json`` of a generated set (without fingerprint: not finished); None where there is none."""
    path = Path(root) / "meta.json"
    if not path.is_file():
        return None
    meta = read_json(path)
    if not isinstance(meta, dict) or not str(meta.get("format", "")).startswith("tag2mask/synthetic"):
        raise FileExistsError(f"{path} does not belong to a generated data set: choose another folder")
    return meta


def image_name(split: str, index: int) -> str:
    """Name of an image: the folders of VOC are shared by all splits."""
    return f"{split}_{index:05d}"


def _changes(found: dict, wanted: dict) -> str:
    """``strength: 0.9 -> 0.5, ...`` for an error message."""
    old, new = found.get("options", {}), wanted["options"]
    changed = [
        f"{key}: {old.get(key)} -> {new.get(key)}" for key in {**new, **old} if old.get(key) != new.get(key)
    ]
    return ", ".join(changed) or f"format: {found['format']} -> {wanted['format']}"


def _for_each(parts: list, root: Path, options: SceneOptions, workers: int) -> Iterator[int]:
    if workers <= 1 or len(parts) <= 1:
        yield from (_write_images(root, options, part) for part in parts)
        return
    # spawn: the caller may already run threads, which a forked process would inherit in an undefined state.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, initializer=start_worker) as pool:
        yield from pool.map(_write_images, [root] * len(parts), [options] * len(parts), parts)


def _write_images(root: Path, options: SceneOptions, images: list[tuple[str, int]]) -> int:
    """Write some images; the annotation comes last and says that the other two files are complete."""
    for split, index in images:
        scene, name = render_scene(options, split, index), image_name(split, index)
        write_atomic(root / "JPEGImages" / f"{name}.jpg", _jpeg(scene.image))
        write_mask(root / "SegmentationClass" / f"{name}.png", scene.mask)
        write_atomic(root / "Annotations" / f"{name}.xml", _annotation(name, scene, options).encode())
    return len(images)


def _jpeg(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    # Without chroma subsampling: at this size a block of 16 x 16 pixels is as large as a wheel.
    Image.fromarray(image).save(buffer, "JPEG", quality=95, subsampling=0)
    return buffer.getvalue()


_OBJECT_XML = """\
\t<object>
\t\t<name>{name}</name>
\t\t<pose>Unspecified</pose>
\t\t<truncated>{truncated:d}</truncated>
\t\t<occluded>{occluded:d}</occluded>
\t\t<difficult>0</difficult>
\t\t<bndbox><xmin>{xmin}</xmin><ymin>{ymin}</ymin><xmax>{xmax}</xmax><ymax>{ymax}</ymax></bndbox>
\t</object>
"""

_IMAGE_XML = """\
<annotation>
\t<folder>JPEGImages</folder>
\t<filename>{name}.jpg</filename>
\t<source><database>generated scenes</database></source>
\t<size><width>{side}</width><height>{side}</height><depth>3</depth></size>
\t<segmented>1</segmented>
{objects}</annotation>
"""


def _annotation(name: str, scene: Scene, options: SceneOptions) -> str:
    objects = ""
    for item in scene.objects:
        x0, y0, x1, y1 = item.box
        box = {
            "xmin": x0 + 1,
            "ymin": y0 + 1,
            "xmax": x1,
            "ymax": y1,
        }  # VOC counts from 1 and includes the last pixel
        class_name = options.classes[item.class_id - 1]
        objects += _OBJECT_XML.format(
            name=class_name, truncated=item.truncated, occluded=item.occluded, **box
        )
    return _IMAGE_XML.format(name=name, side=options.image_size, objects=objects)


def _fingerprint(root: Path, images: list[tuple[str, int]]) -> str:
    """Short hash over every image, mask and annotation."""
    digest = hashlib.sha256()
    for item in images:
        name = image_name(*item)
        for path in (f"JPEGImages/{name}.jpg", f"SegmentationClass/{name}.png", f"Annotations/{name}.xml"):
            digest.update(path.encode() + (root / path).read_bytes())
    return digest.hexdigest()[:16]
