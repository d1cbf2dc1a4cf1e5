"""Annotations of other programs as masks and tags, and masks as annotations of other programs.

H x W the image.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from pycocotools import mask as rle

from datasets.coco_masks import Annotation, Photo, draw, read_instances
from datasets.lists import nfc, read_text, real_classes
from datasets.voc import objects_in_xml
from utils.files import read_json
from utils.image import IGNORE_INDEX

Sizes = Mapping[str, tuple[int, int]]  # rows and columns by image name


@dataclass
class Annotated:
    """What is known of one image."""

    words: set[str] = field(default_factory=set)  # classes that it shows
    regions: list[tuple[str, Any]] = field(default_factory=list)  # of objects with a shape: class, RLE
    crowds: list[Any] = field(default_factory=list)  # regions that do not count
    has_shapes: bool = True  # all its objects have one, so a mask can be drawn

    def add(self, word: str, region: Any | None) -> None:
        """Add an object; without a region its place is unknown."""
        self.words.add(word)
        if region is None:
            self.has_shapes = False
        else:
            self.regions.append((word, region))

    def mask(self, size: tuple[int, int], class_names: Sequence[str]) -> np.ndarray:
        """The mask (H, W): where objects overlap the first one stays; crowds are 255."""
        values = {name: k for k, name in enumerate(class_names)}
        items = [Annotation(values[word], False, region) for word, region in self.regions]
        items += [Annotation(1, True, region) for region in self.crowds]
        return draw(Photo(size, items))


Found = tuple[list[str], dict[str, Annotated]]  # class names without background, and images by name


def from_coco(source: Path, sizes: Sizes) -> Found:
    """Class names in the order of their ids, and the images of a file of COCO's instances."""
    names, photos = read_instances(source)
    found = {}
    for image, photo in photos.items():
        found[image] = Annotated({names[item.value] for item in photo.annotations})
        for item in photo.annotations:
            if item.is_crowd:
                found[image].crowds.append(item.region)
            else:
                found[image].add(names[item.value], item.region)
    return list(names[1:]), found


def from_voc(source: Path, sizes: Sizes) -> Found:
    """Tags from a folder of VOC's XML files; boxes are no shapes."""
    found = {}
    for path in _files(source, ".xml"):
        words = objects_in_xml(path)
        found[_name(path, source)] = Annotated(words, has_shapes=not words)
    return _sorted_words(found), found


def from_labelme(source: Path, sizes: Sizes) -> Found:
    """A folder of labelme's JSON files: polygons, rectangles and circles; other shapes give tags alone."""
    found = {}
    for path in _files(source, ".json"):
        content = read_json(path)
        if not isinstance(content, dict) or not isinstance(content.get("shapes"), list):
            raise ValueError(f"{path} is no file of labelme: it has no list of shapes")
        name = _name(path, source)
        image = found[name] = Annotated()
        image.words |= {nfc(word) for word, is_set in (content.get("flags") or {}).items() if is_set}
        for shape in content["shapes"]:
            try:
                kind, points = shape.get("shape_type", "polygon"), np.array(shape["points"], float)
                polygon = _polygon(kind, points)
                word = nfc(str(shape["label"]).strip())
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                raise ValueError(f"{path}: a shape has no label or no points (x, y): {error!r}") from error
            image.add(word, None if polygon is None else _region(polygon, sizes, name, path))
    return _sorted_words(found), found


def from_yolo(source: Path, sizes: Sizes, names: Sequence[str]) -> Found:
    """A folder of YOLO's text files: polygons, or boxes, which give tags alone."""
    found = {}
    for path in _files(source, ".txt"):
        name = _name(path, source)
        if name not in sizes:  # classes.txt and the like
            continue
        image = found[name] = Annotated()
        for number, line in enumerate(read_text(path).splitlines(), start=1):
            place = f"{path}, line {number}"
            try:
                first, *rest = line.split() or ["-1"]
                class_id, values = int(first), np.array(rest, float)
            except ValueError as error:
                raise ValueError(f"{place}: expected a class number and numbers from 0 to 1") from error
            if not line.strip():
                continue
            if not 0 <= class_id < len(names) or len(values) < 4 or len(values) % 2:
                raise ValueError(f"{place}: class {class_id} with {len(values)} numbers is no object")
            height, width = sizes[name]
            polygon = values.reshape(-1, 2) * (width, height)
            image.add(names[class_id], None if len(values) == 4 else _region(polygon, sizes, name, path))
    return list(names), found


def from_folders(source: Path, sizes: Sizes) -> Found:
    """Tags from the folder that an image is in (ImageFolder)."""
    if loose := [name for name in sizes if "/" not in name]:
        raise ValueError(f"{source / loose[0]} is in no folder of a class")
    found = {name: Annotated({name.partition("/")[0]}, has_shapes=False) for name in sizes}
    return _sorted_words(found), found


def yolo_names(path: Path) -> list[str]:
    """Class names of a data.yaml (a list, or a mapping of numbers), or of a text file of lines."""
    if path.suffix not in (".yaml", ".yml"):
        return [line.strip() for line in read_text(path).splitlines() if line.strip()]
    content = yaml.safe_load(read_text(path))
    names = content.get("names") if isinstance(content, dict) else None
    if isinstance(names, dict):
        names = [names[key] for key in sorted(names)]
    if not isinstance(names, list):
        raise ValueError(f"{path} has no names of classes")
    return [nfc(str(name)) for name in names]


def coco_of(masks: Iterator[tuple[str, np.ndarray]], class_names: Sequence[str]) -> dict[str, Any]:
    """Masks by file name of their image, as COCO's JSON: one run-length code for each class of an image."""
    images, annotations = [], []
    for number, (file_name, mask) in enumerate(masks, start=1):
        height, width = mask.shape
        images.append({"id": number, "file_name": file_name, "height": height, "width": width})
        for value in _values(mask):
            region = rle.encode(np.asfortranarray(mask == value))
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number,
                    "category_id": int(value),
                    "iscrowd": 0,
                    "area": int(rle.area(region)),
                    "bbox": rle.toBbox(region).tolist(),
                    "segmentation": {"size": region["size"], "counts": region["counts"].decode()},
                }
            )
    categories = [{"id": k, "name": name} for k, name in real_classes(class_names).items() if k]
    return {"images": images, "annotations": annotations, "categories": categories}


def yolo_of(mask: np.ndarray) -> str:
    """The lines of a YOLO file: the outline of every connected part of a class; holes are filled."""
    import cv2

    height, width = mask.shape
    lines = []
    for value in _values(mask):
        number = value - 1 - (value > IGNORE_INDEX)
        area = (mask == value).astype(np.uint8)
        outlines, _ = cv2.findContours(area, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
        for outline in outlines:
            if len(outline) >= 3:
                # OpenCV gives the pixels of the outline, YOLO's points are on a scale from border to border.
                points = (outline[:, 0] + 0.5) / (width, height)
                lines.append(f"{number} " + " ".join(f"{v:.6f}" for v in points.ravel()))
    return "".join(f"{line}\n" for line in lines)


def _values(mask: np.ndarray) -> list[int]:
    return [int(value) for value in np.unique(mask) if value not in (0, IGNORE_INDEX)]


def _polygon(kind: str, points: np.ndarray) -> np.ndarray | None:
    """The corners (n, 2) of a shape of labelme; None for one without an area."""
    if kind == "rectangle":
        (x0, y0), (x1, y1) = points
        return np.array([[x0, y0], [x1, y0], [x1, y1], [x0, y1]])
    if kind == "circle":
        angle = np.linspace(0, 2 * np.pi, 64, endpoint=False)[:, None]
        radius = np.linalg.norm(points[1] - points[0])
        return points[0] + radius * np.hstack([np.cos(angle), np.sin(angle)])
    return points if kind == "polygon" and len(points) >= 3 else None


def _region(polygon: np.ndarray, sizes: Sizes, name: str, path: Path) -> Any:
    if name not in sizes:
        raise FileNotFoundError(f"{path}: its image '{name}' is not in --images")
    return rle.merge(rle.frPyObjects([polygon.ravel().tolist()], *sizes[name]))


def _files(source: Path, suffix: str) -> list[Path]:
    files = sorted(path for path in source.rglob(f"*{suffix}") if not path.name.startswith("."))
    if not files:
        raise FileNotFoundError(f"there is no {suffix} file in {source}")
    return files


def _name(path: Path, source: Path) -> str:
    return nfc(path.relative_to(source).with_suffix("").as_posix())


def _sorted_words(found: Mapping[str, Annotated]) -> list[str]:
    return sorted({word for image in found.values() for word in image.words})
