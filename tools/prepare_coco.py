"""Make what training needs from MS COCO 2014: masks of the 80 classes, tags, split lists (docs/data.md).

    python tools/prepare_coco.py --root data/coco
    python tools/prepare_coco.py --root data/coco --masks other/masks       masks that somebody else made

An interrupted run continues; masks that are there are kept.
"""

import hashlib
import sys
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from engine.config.options import command_line, option

EXPECTED = {"train": 82081, "val": 40137, "val_part": 5000}
# Category ids 1..90 have gaps here. In masks that hold category ids these values never occur; in masks that
# number the 80 classes without gaps they all do, and 81..90 do not.
UNUSED_IDS = (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)
CATEGORY_IDS = tuple(k for k in range(1, 91) if k not in UNUSED_IDS)


@dataclass(kw_only=True)
class Options:
    root: Path = option(Path("data/coco"), "folder with annotations/, train2014/ and val2014/")
    masks: Path | None = option(None, "folder of masks made elsewhere, in place of drawing", reads=True)
    any_counts: bool = option(False, "accept a part of COCO")


def run(options: Options) -> dict[str, int]:
    """Prepare the folder ``root``; returns the number of images of each list."""
    import numpy as np

    from datasets.coco_masks import draw, read_annotations, tags_of
    from datasets.lists import check_counts
    from datasets.tags import write_tags
    from utils.files import write_atomic, write_json
    from utils.image import read_mask, write_mask
    from utils.logging import progress_bar

    root, foreign = options.root, options.masks
    rule = {"masks": str(foreign.absolute())} if foreign else {"overlap": "first", "crowd": "ignore"}
    photos = {
        part: read_annotations(root / f"annotations/instances_{part}2014.json") for part in ("train", "val")
    }
    _claim(root, rule)
    lists: dict[str, list[str]] = {}
    tags: dict[str, list[str]] = {}
    checksums: dict[str, str] = {}
    for part, annotated in photos.items():
        out = root / "SegmentationClass" / f"{part}2014"
        if foreign is not None:
            adopt(foreign, part, annotated, out)
        histogram = np.zeros(256, dtype=np.int64)
        for name, photo in progress_bar(annotated.items(), desc=out.name, unit="image"):
            path = out / f"{name}.png"
            if not path.is_file():
                write_mask(path, draw(photo))
            mask = read_mask(path)
            histogram += np.bincount(mask.ravel(), minlength=256)
            tags[name] = tags_of(photo, mask, with_crowds=foreign is None)
        text = "\n".join(f"{value} {count}" for value, count in enumerate(histogram.tolist()) if count)
        checksums[part] = hashlib.sha256(text.encode()).hexdigest()[:16]
        lists[part] = sorted(annotated)
    lists["val_part"] = lists["val"][: EXPECTED["val_part"]]
    for split, names in lists.items():
        write_atomic(root / "ImageSets" / f"{split}.txt", "".join(f"{name}\n" for name in names).encode())
    write_tags(root / "tags.csv", {name: tags[name] for part in photos for name in lists[part]})
    counts = {split: len(names) for split, names in lists.items()}
    write_json(root / "masks.json", {"rule": rule, "images": counts, "label_histogram_sha256": checksums})
    check_counts(counts, EXPECTED, "COCO 2014", options.any_counts)
    return counts


def adopt(masks: Path, part: str, names: Collection[str], out: Path) -> None:
    """Write masks that were made elsewhere under our names and numbers; those that are there are kept.

    Two layouts are known, ``{part}2014/COCO_{part}2014_000000000009.png`` and ``{part}/000000000009.png``,
    and two numberings, which the values that occur tell apart: the 80 classes without gaps, and category ids.
    """
    import numpy as np

    from datasets.lists import some
    from utils.image import MAX_CLASS, read_mask, write_mask
    from utils.logging import progress_bar

    places = {
        name: (masks / f"{part}2014" / f"{name}.png", masks / part / f"{name.rpartition('_')[2]}.png")
        for name in names
    }
    paths = {name: path for name, both in places.items() for path in both[::-1] if path.is_file()}
    if missing := [name for name in names if name not in paths]:
        raise FileNotFoundError(
            f"{some(missing, len(names), 'masks')} of {part}2014 are missing in {masks}: looked for "
            f"{part}2014/NAME.png and {part}/NUMBER.png"
        )
    used = np.zeros(MAX_CLASS + 1, dtype=bool)
    for path in progress_bar(paths.values(), desc=f"numbering of {part}2014", unit="image"):
        used[np.unique(read_mask(path))] = True
    table = numbering(np.flatnonzero(used).tolist(), masks)
    for name, path in progress_bar(paths.items(), desc=out.name, unit="image"):
        if not (out / f"{name}.png").is_file():
            write_mask(out / f"{name}.png", table[read_mask(path)])


def numbering(values: Iterable[int], source: str | Path) -> Any:
    """(256,) uint8 table from the values of masks in circulation to ours, by all that occur in them."""
    import numpy as np

    seen = set(values) - {0, 255}
    contiguous = all(value <= 80 for value in seen)
    categories = not seen & set(UNUSED_IDS) and all(value <= 90 for value in seen)
    if contiguous == categories:
        why = "fit both numberings" if contiguous else f"fit neither ({sorted(seen)[-5:]} among them)"
        raise ValueError(f"values of the masks in {source} {why}, 1..80 and category ids: leave --masks out")
    table = np.arange(256, dtype=np.uint8)
    if categories:
        table[list(CATEGORY_IDS)] = np.arange(1, 81, dtype=np.uint8)
    kind = "81 ids (0 and the 80 classes)" if contiguous else "91 ids (0 and category ids), mapped to 81"
    print(f"{source}: {kind}")
    return table


def _claim(root: Path, rule: Mapping[str, str]) -> None:
    """Masks of two rules must not mix: what is there must have been made by this one."""
    from utils.files import read_json, write_json

    record, folder = root / "masks.json", root / "SegmentationClass"
    if record.is_file() and folder.is_dir() and read_json(record)["rule"] != rule:
        raise ValueError(f"masks in {folder} follow another rule: move them and {record} away")
    write_json(record, {"rule": dict(rule)})


if __name__ == "__main__":
    command_line(Options, run, __doc__)
