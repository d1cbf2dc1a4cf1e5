"""MS COCO 2014, mask values 1..80: where the files are and what the classes are called."""

from collections.abc import Sequence
from pathlib import Path

from datasets.base import Split
from datasets.voc import voc_split

# In the order of COCO's category ids, which have gaps: mask value k is the k-th category, not category id k.
# fmt: off
CLASS_NAMES = (
    "background", "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat",
    "traffic light", "fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse",
    "sheep", "cow", "elephant", "bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie",
    "suitcase", "frisbee", "skis", "snowboard", "sports ball", "kite", "baseball bat", "baseball glove",
    "skateboard", "surfboard", "tennis racket", "bottle", "wine glass", "cup", "fork", "knife", "spoon",
    "bowl", "banana", "apple", "sandwich", "orange", "broccoli", "carrot", "hot dog", "pizza", "donut",
    "cake", "chair", "couch", "potted plant", "bed", "dining table", "toilet", "tv", "laptop", "mouse",
    "remote", "keyboard", "cell phone", "microwave", "oven", "toaster", "sink", "refrigerator", "book",
    "clock", "vase", "scissors", "teddy bear", "hair drier", "toothbrush",
)
# fmt: on


def coco_split(
    root: str | Path,
    split: str,
    *,
    lists: str = "ImageSets",
    images: str = "{part}2014",
    masks: str | None = "SegmentationClass/{part}2014",
    tags: str | None = "tags.csv",
    class_names: str | Sequence[str] | None = None,
) -> Split:
    """One split of COCO 2014 as `tools/prepare_coco.py` prepares it.

    Args:
        root: folder of the data set, for example ``data/coco``.
        split: name of a list (``train``, ``val``, ``val_part``), or path of a text file of image names.
        lists: folder of the lists, below root.
        images: folder of the JPEG images, below root, or a pattern (``{part}/{name}.jpg``); ``{part}`` is
            train or val, as in the image's name.
        masks: folder of the PNG masks, below root, or a pattern; null: there are none.
        tags: file of image tags (CSV, JSON or text), below root; null: tags are unknown.
        class_names: file below root whose line k names mask value k, or a list; null: the 80 classes of COCO.
    """
    names = CLASS_NAMES if class_names is None else class_names
    return voc_split(root, split, lists=lists, images=images, masks=masks, tags=tags, class_names=names)
