"""Whether masks and tags of a split speak of the same classes, before anything is scored."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from datasets.base import Split, WeakSegDataset
from utils.image import IGNORE_INDEX
from utils.logging import warn_once


def compare_masks_with_tags(split: Split, most: int = 200, *, may_lack_classes: bool = False) -> None:
    """Read some of the masks and compare the classes they show with the tags of their images.

    Masks of another order of classes, or that a program has renumbered, show classes without the tag. Tags
    may lack objects, so a class that fewer than half of its images have as a tag causes a warning only.

    Args:
        most: masks to read, spread evenly over the split.
        may_lack_classes: masks that show no class at all are no error, for nothing is scored with them.

    Raises:
        ValueError: a mask of another size than its image, or with values that are no classes; no mask shows
            any class though images have tags; fewer than half of what all masks show are tags.
    """
    compared = tuple(r for r in split.records if r.tags and r.mask is not None and r.mask.is_file())
    if not compared:
        return
    dataset = WeakSegDataset(replace(split, records=compared), with_mask=True)
    shown, agreed = np.zeros(split.num_classes, int), np.zeros(split.num_classes, int)
    for index in range(0, len(compared), -(-len(compared) // most)):
        classes = np.setdiff1d(dataset[index]["mask"], [0, IGNORE_INDEX])
        shown[classes] += 1
        agreed[np.intersect1d(classes, compared[index].tags)] += 1
    first = compared[0].mask
    if not shown.any() and may_lack_classes:
        return
    if not shown.any():
        raise ValueError(
            f"no mask of split '{split.name}' that was tried (first {first}) holds any of the classes; "
            f"{IGNORE_INDEX} means ignored, class 1 must be 1"
        )
    advice = "are mask values in the order of the class names (data.options.class_names)?"
    if 2 * agreed.sum() < shown.sum() >= 3:
        raise ValueError(
            f"masks of split '{split.name}' (first {first}) and tags disagree: {agreed.sum()} of "
            f"{shown.sum()} classes that masks show are tags of their images; {advice}"
        )
    wrong = np.flatnonzero((shown >= 3) & (2 * agreed < shown))
    if len(wrong):
        few = ", ".join(f"{split.class_names[k]} {agreed[k]} of {shown[k]}" for k in wrong[:5])
        warn_once(
            f"few images of split '{split.name}' whose masks show a class have it as tag ({few}): {advice}"
        )
