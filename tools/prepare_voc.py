"""Make what training needs from PASCAL VOC 2012 and its SBD annotations: tags, the trainaug list, masks.

    python tools/prepare_voc.py --root data/VOCdevkit/VOC2012 --sbd data/benchmark_RELEASE

``SegmentationClassAug`` gets VOC's own masks for VOC train and val, whatever was there, and SBD's for the
others (docs/data.md). An interrupted run continues.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from engine.config.options import command_line, option

EXPECTED = {"train": 1464, "val": 1449, "trainaug": 10582, "test": 1456}
LISTS = Path("ImageSets/Segmentation")


@dataclass(kw_only=True)
class Options:
    root: Path = option(Path("data/VOCdevkit/VOC2012"), "folder VOC2012 of the unpacked archive")
    sbd: Path | None = option(None, "benchmark_RELEASE of SBD, in place of SegmentationClassAug", reads=True)
    any_counts: bool = option(False, "accept a part of VOC")


def run(options: Options) -> dict[str, int]:
    """Prepare the folder; returns the number of images of each list."""
    from datasets.agreement import compare_masks_with_tags
    from datasets.lists import check_counts, read_list, some
    from datasets.tags import write_tags
    from datasets.voc import CLASS_NAMES, voc_split
    from datasets.voc_masks import convert_sbd, copy_masks, image_tags, names_in, trainaug_names
    from utils.files import require_files, write_atomic
    from utils.logging import warn_once

    root, masks = options.root, options.root / "SegmentationClassAug"
    for part in ("JPEGImages", "Annotations", "SegmentationClass", LISTS):
        if not (root / part).is_dir():
            raise FileNotFoundError(f"{root} is not an unpacked VOC 2012 (--root): {part} is missing")
    train, val = (list(read_list(root / LISTS / f"{split}.txt")) for split in ("train", "val"))
    if options.sbd:
        convert_sbd(options.sbd, root, {*train, *val})
    elif not names_in(masks, "*.png"):
        raise FileNotFoundError(f"{masks} is missing: unpack it, or make it with --sbd benchmark_RELEASE")
    copy_masks(root, [*train, *val])
    trainaug = trainaug_names(names_in(masks, "*.png"), train, val)
    write_atomic(root / LISTS / "trainaug.txt", "".join(f"{name}\n" for name in trainaug).encode())
    images = [root / "JPEGImages" / f"{name}.jpg" for name in [*trainaug, *val]]
    require_files(images, "images", "unpack VOCtrainval_11-May-2012.tar again")

    tags = image_tags(root, sorted({*trainaug, *val}))
    write_tags(root / "tags.csv", tags)
    for split in ("trainaug", "val"):
        compare_masks_with_tags(voc_split(root, split))
    per_class = {name: sum(name in tags[image] for image in trainaug) for name in CLASS_NAMES[1:]}
    print("trainaug images per class: " + ", ".join(f"{name} {count}" for name, count in per_class.items()))
    if untagged := [name for name, words in tags.items() if not words]:
        warn_once(f"{some(untagged, len(tags), 'images')} have no object")
    counts = {"train": len(train), "val": len(val), "trainaug": len(trainaug)}
    if (root / LISTS / "test.txt").is_file():
        counts["test"] = len(read_list(root / LISTS / "test.txt"))
    check_counts(counts, EXPECTED, "VOC 2012 and SBD", options.any_counts)
    return counts


if __name__ == "__main__":
    command_line(Options, run, __doc__)
