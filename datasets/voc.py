"""PASCAL VOC 2012, and every data set in its layout: where the files are and what the classes are called."""

import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable, Sequence
from pathlib import Path

from datasets.base import Record, Split
from datasets.lists import check_paths, file_of, find_list, read_class_names, read_list, some
from datasets.tags import read_tags
from utils.files import require_files
from utils.problems import problem

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
    contexts: str | None = None,
) -> Split:
    """One split of a data set in VOC layout.

    Only ``test`` and lists of one's own may hold images without ground truth or tags.

    Args:
        root: folder of the data set, for example ``data/VOCdevkit/VOC2012``.
        split: name of a list (``trainaug``), or path of a text file with an image name per line.
        lists: folder of the lists, below root.
        images: folder of the JPEG images, below root, or a pattern such as ``images/{name}.png``.
        masks: folder of the PNG masks, below root, or a pattern; null: there are none.
        tags: file of image tags (CSV, JSON or text), below root; null: tags are unknown.
        class_names: file below root whose line k names mask value k, or a list; null: the 20 classes of VOC.
        contexts: folder of the maps of contexts that generated scenes have, below root.
    """
    root = Path(root)
    classes = read_class_names(class_names, root, CLASS_NAMES)
    list_file = find_list(root, lists, split)
    names = read_list(list_file)
    may_lack = split == "test" or split.endswith(".txt")
    image_files = [file_of(root, images, name, ".jpg") for name in names]
    advice = "unpack them there, or set data.root or data.options.images"
    require_files(image_files, f"images of split '{split}'", advice)
    check_paths(list_file, names, root, dict(zip(names, image_files)))
    mask_files = [file_of(root, masks, name, ".png") if masks else None for name in names]
    if may_lack:
        mask_files = [path if path is not None and path.is_file() else None for path in mask_files]
    known: dict[str, tuple[int, ...]] = {}
    if tags is not None and ((root / tags).is_file() or not may_lack):
        known = read_tags(root / tags, classes)
        if not may_lack and (without := [name for name in names if name not in known]):
            lacking = some(without, len(names), "images")
            problem(ValueError(f"{lacking} of split '{split}' have no line in {root / tags}"))
    records = (
        Record(
            name, image, mask, known.get(name), context=root / contexts / f"{name}.png" if contexts else None
        )
        for name, image, mask in zip(names, image_files, mask_files, strict=True)
    )
    return Split(list_file.stem, classes, tuple(records))


def tags_from_xml(annotations: str | Path, names: Iterable[str]) -> dict[str, list[str]]:
    """Image name -> names of the classes that its VOC annotation ``<name>.xml`` holds, in class order.

    Objects that are marked difficult count, as in the tag table that the field shares.

    Raises:
        ValueError: a file that is not XML, or an object of an unknown class.
    """
    tags = {}
    for name in names:
        path = Path(annotations) / f"{name}.xml"
        present = objects_in_xml(path)
        if unknown := present - set(CLASS_NAMES[1:]):
            raise ValueError(f"annotation {path} has an object of the unknown class '{min(unknown)}'")
        tags[name] = [word for word in CLASS_NAMES[1:] if word in present]
    return tags


def objects_in_xml(path: Path) -> set[str]:
    """Names of the objects that a VOC annotation holds."""
    try:
        # Only direct children: the parts of a person (head, hand, foot) are nested objects.
        objects = ElementTree.parse(path).getroot().findall("object")
    except ElementTree.ParseError as error:
        raise ValueError(f"annotation {path} is not valid XML: {error}") from error
    return {(item.findtext("name") or "").strip() for item in objects}
