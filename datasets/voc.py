"""PASCAL VOC 2012, and every data set in its layout: where the files are and what the classes are called."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable, Sequence
from pathlib import Path

from datasets.base import Split, listed_split
from datasets.lists import read_class_names

# fmt: off
CLASS_NAMES = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train",
    "tvmonitor",
)
# fmt: on


def voc_split(
    root: str | Path,
    split: str,
    *,
    lists: str = "ImageSets/Segmentation",
    images: str = "JPEGImages",
    masks: str | None = "SegmentationClassAug",
    tags: str | None = "tags.csv",
    class_names: str | Sequence[str] | None = None,
) -> Split:
    """One split of a data set in VOC layout.

    ``test`` and lists of one's own may hold images without ground truth or tags: their records have a mask or
    tags where there are any, else None. Everywhere else a missing tag is an error here, a missing mask where
    it is asked for.

    Args:
        root: folder of the data set, for example ``data/VOCdevkit/VOC2012``.
        split: name of a list (``trainaug``), or path of a text file with an image name per line.
        lists: folder of the lists, below root.
        images: folder of the JPEG images, below root, or a pattern such as ``images/{name}.png``.
        masks: folder of the PNG masks, below root, or a pattern; null: there are none.
        tags: file of image tags (CSV, JSON or text), below root; null: tags are unknown.
        class_names: file below root whose line k names mask value k, or a list; null: the 20 classes of VOC.
    """
    classes = read_class_names(class_names, Path(root), CLASS_NAMES)
    make_tags = f"python tools/prepare_voc.py --root {root}"
    return listed_split(
        root, split, classes, lists=lists, images=images, masks=masks, tags=tags, make_tags=make_tags
    )


def tags_from_xml(
    annotations: str | Path,
    names: Iterable[str],
    class_names: Sequence[str] = CLASS_NAMES,
    difficult: bool = True,
) -> dict[str, list[str]]:
    """Image name -> names of the classes that its VOC annotation holds, in class order.

    Args:
        annotations: folder of ``<name>.xml``.
        names: the images to read.
        class_names: background and then the classes.
        difficult: whether objects that are marked difficult count as present. The tag table that the field
            shares counts them; so does this project.

    Raises:
        FileNotFoundError: an annotation is missing.
        ValueError: a file that is not XML, or an object of an unknown class.
    """
    return {
        name: _tags_of_annotation(Path(annotations) / f"{name}.xml", class_names, difficult) for name in names
    }


def _tags_of_annotation(path: Path, class_names: Sequence[str], difficult: bool) -> list[str]:
    if not path.is_file():
        raise FileNotFoundError(f"annotation {path} is missing")
    try:
        # Only direct children: the parts of a person (head, hand, foot) are nested objects with names of
        # their own.
        objects = ElementTree.parse(path).getroot().findall("object")
    except ElementTree.ParseError as error:
        raise ValueError(f"annotation {path} is not valid XML: {error}") from error
    present = {
        (item.findtext("name") or "").strip()
        for item in objects
        if difficult or (item.findtext("difficult") or "0").strip() != "1"
    }
    unknown = present - set(class_names[1:])
    if unknown:
        raise ValueError(f"annotation {path} holds an object of the unknown class '{min(unknown)}'")
    return [name for name in class_names[1:] if name in present]
