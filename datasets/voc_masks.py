"""Masks and tags of PASCAL VOC 2012 out of what is published: VOC's own files and SBD's."""

from pathlib import Path

import numpy as np
import scipy.io

from datasets.lists import some
from datasets.voc import CLASS_NAMES, tags_from_xml
from utils.files import require_files, write_atomic
from utils.image import read_mask, write_mask
from utils.logging import progress_bar, warn_once


def trainaug_names(augmented: set[str], train: list[str], val: list[str]) -> list[str]:
    """Every augmented label that is not in val, sorted: 10,582 names that contain all of train."""
    if missing := [name for name in train if name not in augmented]:
        lacking = some(missing, len(train), "masks")
        raise FileNotFoundError(f"SegmentationClassAug lacks {lacking} of VOC train: unpack it, or use --sbd")
    return sorted(augmented - set(val))


def copy_masks(root: Path, names: list[str]) -> None:
    """Give the images of VOC train and val VOC's own masks in ``SegmentationClassAug``.

    SBD also labels many of them, more coarsely: VOC's masks have the 255 border, SBD's have none.
    """
    masks = [root / "SegmentationClass" / f"{name}.png" for name in names]
    require_files(masks, "masks of VOC train and val", "unpack VOCtrainval_11-May-2012.tar again")
    replaced = []
    for path in progress_bar(masks, desc="masks of VOC", unit="image"):
        copy = root / "SegmentationClassAug" / path.name
        if copy.is_file() and not np.array_equal(read_mask(copy), read_mask(path)):
            replaced.append(path.stem)
        write_atomic(copy, path.read_bytes())
    if replaced:
        print(f"{some(replaced, len(names), 'masks')} of VOC train and val were not VOC's own: replaced")


def convert_sbd(sbd: Path, root: Path, own: set[str]) -> None:
    """Fill ``SegmentationClassAug`` with SBD's masks of all images but ``own``; masks that are there stay."""
    folder = next((place for place in (sbd / "dataset" / "cls", sbd / "cls") if place.is_dir()), None)
    if folder is None:
        raise FileNotFoundError(f"{sbd} has no dataset/cls: set --sbd to the unpacked benchmark_RELEASE")
    out = root / "SegmentationClassAug"
    for name in progress_bar(sorted(names_in(folder, "*.mat") - own), desc="masks of SBD", unit="image"):
        if not (out / f"{name}.png").is_file():
            write_mask(out / f"{name}.png", read_sbd(folder / f"{name}.mat"))


def read_sbd(path: Path) -> np.ndarray:
    """(H, W) class indices 0..20 of an SBD ``cls/*.mat`` file (field ``GTcls.Segmentation``)."""
    try:
        mask = np.asarray(scipy.io.loadmat(path)["GTcls"]["Segmentation"][0, 0])
    # scipy raises many things on damaged files (ValueError, zlib.error, NotImplementedError, ...).
    except Exception as error:
        raise ValueError(f"{path} is not an SBD class annotation, or damaged: {error}") from error
    if mask.ndim != 2 or mask.max(initial=0) >= len(CLASS_NAMES):
        raise ValueError(f"{path} holds {mask.shape} values up to {mask.max()}, not (H, W) classes 0..20")
    return mask.astype(np.uint8)


def image_tags(root: Path, names: list[str]) -> dict[str, list[str]]:
    """Tags of every image from its annotation; without one from its mask, and a warning says so."""
    annotated = names_in(root / "Annotations", "*.xml")
    if without := [name for name in names if name not in annotated]:
        warn_once(f"{some(without, len(names), 'images')} have no XML annotation; their masks give the tags")
    present = progress_bar([name for name in names if name in annotated], desc="annotations", unit="image")
    tags = tags_from_xml(root / "Annotations", present)
    for name in without:
        values = np.unique(read_mask(root / "SegmentationClassAug" / f"{name}.png"))
        tags[name] = [CLASS_NAMES[k] for k in values if 0 < k < len(CLASS_NAMES)]
    return {name: tags[name] for name in names}


def names_in(folder: Path, pattern: str) -> set[str]:
    """Names of the files that are not hidden."""
    return {path.stem for path in folder.glob(pattern) if not path.name.startswith(".")}
