"""Make what training needs from PASCAL VOC 2012 and its SBD annotations: tags, the trainaug list, masks.

    python tools/prepare_voc.py --root data/VOCdevkit/VOC2012 --sbd data/benchmark_RELEASE

Reads ``Annotations/*.xml``, ``SegmentationClass``, ``ImageSets/Segmentation`` and, for the masks that VOC
itself has not, either a folder ``SegmentationClassAug`` or SBD's ``.mat`` files. Writes below root
``tags.csv``, ``ImageSets/Segmentation/trainaug.txt`` and ``SegmentationClassAug``: VOC's own mask for the
images of VOC train and val, whatever was there, SBD's for the others. An interrupted run continues.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import scipy.io

from datasets.agreement import compare_masks_with_tags
from datasets.lists import check_counts, read_list, some
from datasets.tags import read_tags, write_tags
from datasets.voc import CLASS_NAMES, tags_from_xml, voc_split
from engine.config.options import command_line, option
from utils.files import require_files, write_atomic
from utils.image import read_mask, write_mask
from utils.logging import progress_bar, warn_once

EXPECTED = {"train": 1464, "val": 1449, "trainaug": 10582, "test": 1456}
LISTS = Path("ImageSets/Segmentation")


@dataclass(kw_only=True)
class Options:
    """Options of the tool."""

    root: Path = option(Path("data/VOCdevkit/VOC2012"), "folder VOC2012 of the unpacked archive")
    sbd: Path | None = option(
        None, "folder benchmark_RELEASE of SBD; not needed with SegmentationClassAug", reads=True
    )
    ignore_difficult: bool = option(
        False, "objects marked difficult give no tag; the field's tag table counts them as present"
    )
    compare: Path | None = option(
        None, "file of tags to compare with, such as cls_labels_onehot.npy", reads=True
    )
    any_counts: bool = option(False, "accept a part of VOC")


def run(options: Options) -> dict[str, int]:
    """Prepare the folder; returns the number of images of each list."""
    root = options.root
    for part in ("JPEGImages", "Annotations", "SegmentationClass", LISTS):
        if not (root / part).is_dir():
            raise FileNotFoundError(
                f"{root} is not an unpacked VOC 2012: {part} is missing; unpack VOCtrainval_11-May-2012.tar "
                "and set --root to its VOC2012"
            )
    train, val = (list(read_list(root / LISTS / f"{split}.txt")) for split in ("train", "val"))
    if options.sbd:
        convert_sbd(options.sbd, root, {*train, *val})
    elif not _names_in(root / "SegmentationClassAug", "*.png"):
        raise FileNotFoundError(
            f"{root / 'SegmentationClassAug'} is missing: unpack one there, or make it from SBD's release "
            "with --sbd benchmark_RELEASE"
        )
    copy_masks(root, [*train, *val])
    augmented = _names_in(root / "SegmentationClassAug", "*.png")
    trainaug = trainaug_names(augmented, train, val)
    write_atomic(root / LISTS / "trainaug.txt", "".join(f"{name}\n" for name in trainaug).encode())
    images = [root / "JPEGImages" / f"{name}.jpg" for name in [*trainaug, *val]]
    require_files(images, "images", "unpack VOCtrainval_11-May-2012.tar again")

    tags = image_tags(root, sorted({*trainaug, *val}), not options.ignore_difficult)
    write_tags(root / "tags.csv", tags)
    for split in ("trainaug", "val"):
        compare_masks_with_tags(voc_split(root, split))
    counts = {"train": len(train), "val": len(val), "trainaug": len(trainaug)}
    if (root / LISTS / "test.txt").is_file():
        counts["test"] = len(read_list(root / LISTS / "test.txt"))
    per_class = {name: sum(name in tags[image] for image in trainaug) for name in CLASS_NAMES[1:]}
    print("trainaug images per class: " + ", ".join(f"{name} {count}" for name, count in per_class.items()))
    if untagged := [name for name, words in tags.items() if not words]:
        warn_once(f"{some(untagged, len(tags), 'images')} have no object")
    if options.compare:
        compare(tags, options.compare)
    check_counts(counts, EXPECTED, "VOC 2012 and SBD", options.any_counts)
    return counts


def trainaug_names(augmented: set[str], train: list[str], val: list[str]) -> list[str]:
    """Every augmented label that is not in val, sorted: 10,582 names that contain all of train."""
    if missing := [name for name in train if name not in augmented]:
        lacking = some(missing, len(train), "masks")
        raise FileNotFoundError(
            f"SegmentationClassAug lacks {lacking} of VOC train: unpack it again, or use --sbd"
        )
    return sorted(augmented - set(val))


def copy_masks(root: Path, names: list[str]) -> None:
    """Give the images of VOC train and val VOC's own masks in ``SegmentationClassAug``.

    SBD also labels many of them, more coarsely: VOC's masks have the 255 border, SBD's have none.
    """
    masks = [root / "SegmentationClass" / f"{name}.png" for name in names]
    require_files(masks, "masks of VOC train and val", "unpack VOCtrainval_11-May-2012.tar again")
    replaced = []
    for path in progress_bar(masks, desc="masks of VOC", unit="image"):
        content, copy = path.read_bytes(), root / "SegmentationClassAug" / path.name
        if not copy.is_file() or copy.read_bytes() != content:
            if copy.is_file() and not np.array_equal(read_mask(copy), read_mask(path)):
                replaced.append(path.stem)
            write_atomic(copy, content)
    if replaced:
        print(f"{some(replaced, len(names), 'masks')} of VOC train and val were not VOC's own: replaced")


def convert_sbd(sbd: Path, root: Path, own: set[str]) -> None:
    """Fill ``SegmentationClassAug`` with SBD's masks of all images but ``own``; masks that are there stay."""
    folder = next((place for place in (sbd / "dataset" / "cls", sbd / "cls") if place.is_dir()), None)
    if folder is None:
        raise FileNotFoundError(f"{sbd} has no dataset/cls: set --sbd to the unpacked benchmark_RELEASE")
    out = root / "SegmentationClassAug"
    out.mkdir(exist_ok=True)
    others = sorted(_names_in(folder, "*.mat") - own)
    for name in progress_bar(others, desc="masks of SBD", unit="image"):
        if not (out / f"{name}.png").is_file():
            write_mask(out / f"{name}.png", read_sbd(folder / f"{name}.mat"))


def read_sbd(path: Path) -> np.ndarray:
    """(H, W) class indices 0..20 of an SBD ``cls/*.mat`` file (field ``GTcls.Segmentation``)."""
    try:
        mask = np.asarray(scipy.io.loadmat(path)["GTcls"]["Segmentation"][0, 0])
    # scipy raises many things on damaged files (ValueError, zlib.error, NotImplementedError, ...).
    except Exception as error:
        raise ValueError(
            f"{path} is not an SBD class annotation, or damaged: {error}; unpack SBD again"
        ) from error
    if mask.ndim != 2 or mask.max(initial=0) >= len(CLASS_NAMES):
        raise ValueError(f"{path} holds {mask.shape} values up to {mask.max()}, not (H, W) classes 0..20")
    return mask.astype(np.uint8)


def image_tags(root: Path, names: list[str], difficult: bool) -> dict[str, list[str]]:
    """Tags of every image from its annotation; without one from its mask, and a warning says so."""
    annotated = _names_in(root / "Annotations", "*.xml")
    if without := [name for name in names if name not in annotated]:
        warn_once(f"{some(without, len(names), 'images')} have no XML annotation; their masks give the tags")
    present = progress_bar([name for name in names if name in annotated], desc="annotations", unit="image")
    tags = tags_from_xml(root / "Annotations", present, difficult=difficult)
    for name in without:
        values = np.unique(read_mask(root / "SegmentationClassAug" / f"{name}.png"))
        tags[name] = [CLASS_NAMES[k] for k in values if 0 < k < len(CLASS_NAMES)]
    return {name: tags[name] for name in names}


def compare(ours: Mapping[str, Sequence[str]], reference: Path) -> None:
    """Raise a ValueError where another table of tags differs."""
    theirs = {name: [CLASS_NAMES[k] for k in ids] for name, ids in read_tags(reference, CLASS_NAMES).items()}
    unequal = sorted(name for name in ours.keys() & theirs.keys() if ours[name] != theirs[name])
    only_one = sorted(ours.keys() ^ theirs.keys())
    print(f"compared tags with {reference}: {len(unequal)} differ, {len(only_one)} images are only in one")
    if unequal or only_one:
        raise ValueError(f"tags differ from {reference}: {some(unequal + only_one, len(theirs), 'images')}")


def _names_in(folder: Path, pattern: str) -> set[str]:
    return {path.stem for path in folder.glob(pattern) if not path.name.startswith(".")}


if __name__ == "__main__":
    command_line(Options, run, __doc__)
