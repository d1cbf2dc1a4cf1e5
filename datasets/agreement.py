"""Whether the tags of a split make sense, and whether masks speak of the same classes."""

from collections import Counter
from dataclasses import replace

import numpy as np
from torch import Tensor

from datasets.base import Record, Split, WeakSegDataset
from datasets.lists import real_classes
from datasets.tags import near_duplicates
from utils.image import IGNORE_INDEX
from utils.logging import warn_once

ADVICE = "are mask values in the order of the class names (data.options.class_names)?"


def tag_warnings(split: Split) -> list[str]:
    """What is odd about the tags of a split: classes of every image, and two spellings of one class."""
    counts = class_counts(split)
    tagged = sum(record.tags is not None for record in split.records)
    warnings = []
    for name, count in counts.items():
        if count == tagged > 1:
            warnings.append(f"all {count} images have the tag '{name}': it cannot be learned from tags")
    for first, second in near_duplicates(list(counts)):
        both = f"'{first}' ({counts[first]} images) and '{second}' ({counts[second]})"
        warnings.append(f"the classes {both} differ by one letter: check the spelling")
    return warnings


def class_counts(split: Split) -> dict[str, int]:
    """Class -> images of the split with its tag, in the order of the classes."""
    counts = Counter(tag for record in split.records for tag in record.tags or ())
    return {name: counts[k] for k, name in real_classes(split.class_names).items() if k}


class Agreement:
    """How many masks show a class, and how many of their images have it as a tag."""

    def __init__(self, split: Split) -> None:
        self.split = split
        self.shown, self.agreed = np.zeros((2, split.num_classes), int)

    def add(self, record: Record, mask: np.ndarray | Tensor) -> None:
        """Count the classes of a mask (H, W); an image without tags is left out."""
        if record.tags:
            classes = np.setdiff1d(mask, [0, IGNORE_INDEX])
            self.shown[classes] += 1
            self.agreed[np.intersect1d(classes, record.tags)] += 1

    def error(self) -> str | None:
        """Why masks and tags cannot be of the same classes: fewer than half of what masks show are tags."""
        if self.shown.any() and 2 * self.agreed.sum() < self.shown.sum() >= 3:
            share = f"{self.agreed.sum()} of {self.shown.sum()} classes in masks are tags of their images"
            return f"masks of split '{self.split.name}' and tags disagree: {share}; {ADVICE}"
        return None

    def warning(self) -> str | None:
        """Classes that fewer than half of the images have as a tag whose masks show them."""
        wrong = np.flatnonzero((self.shown >= 3) & (2 * self.agreed < self.shown))
        if not len(wrong):
            return None
        names = self.split.class_names
        few = ", ".join(f"{names[k]} {self.agreed[k]} of {self.shown[k]}" for k in wrong[:5])
        shown = f"few images of split '{self.split.name}' whose masks show a class have it as tag ({few})"
        return f"{shown}: {ADVICE}"


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
    agreement = Agreement(split)
    for index in range(0, len(compared), -(-len(compared) // most)):
        agreement.add(compared[index], dataset[index]["mask"])
    if not agreement.shown.any() and not may_lack_classes:
        raise ValueError(
            f"no mask of '{split.name}' shows a class (first {compared[0].mask}): class 1 must be 1"
        )
    if error := agreement.error():
        raise ValueError(error)
    if warning := agreement.warning():
        warn_once(warning)
