"""Pack label images for the PASCAL VOC evaluation server, after a look for what it would refuse or misjudge.

python tools/infer_seg_voc.py --model_path logs/seco_voc/last.pth --infer test --out test_masks
python tools/voc_submission.py --labels test_masks --root data/VOCdevkit/VOC2012 --out results.tgz
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from engine.config.options import command_line, option


@dataclass(kw_only=True)
class Options:
    labels: Path = option(meaning="folder of label images <name>.png, of tools/infer_seg_voc.py", reads=True)
    root: Path = option(meaning="VOC2012 folder with the lists and the images of the test set", reads=True)
    out: Path = option(meaning="archive to write, .tgz or .tar.gz")
    split: str = option("test", "list of ImageSets/Segmentation that the server scores")
    competition: int = option(6, "5 (trained on VOC alone) or 6 (on anything)", least=5)


def run(options: Options) -> Path:
    """Check and pack; returns the archive.

    Raises:
        ValueError: every kind of mistake, with the number of images that have it and the first.
        FileNotFoundError: there is no such list.
    """
    import tarfile

    from datasets.lists import read_list
    from utils.files import atomic_file
    from utils.logging import progress_bar

    if options.competition > 6:
        raise ValueError(f"the server has competitions 5 and 6 for segmentation, not {options.competition}")
    if not options.out.name.endswith((".tgz", ".tar.gz")):
        raise ValueError(f"--out {options.out} must end in .tgz or .tar.gz")
    names = list(read_list(options.root / "ImageSets" / "Segmentation" / f"{options.split}.txt"))
    mistakes: dict[str, list[str]] = {}
    has_object = False
    for name in progress_bar(names, desc="check", unit="img"):
        label = options.labels / f"{name}.png"
        mistake, shows = find_mistake(label, options.root / "JPEGImages" / f"{name}.jpg")
        has_object |= shows
        if mistake:
            mistakes.setdefault(mistake, []).append(name)
    if not mistakes and not has_object:
        mistakes["shows background alone: does the network segment?"] = names
    if mistakes:
        lines = [
            f"{len(found)} of {len(names)}, first {found[0]}: {text}" for text, found in mistakes.items()
        ]
        raise ValueError("nothing is packed. Label images with a mistake:\n  " + "\n  ".join(lines))
    folder = f"results/VOC2012/Segmentation/comp{options.competition}_test_cls"
    with atomic_file(options.out) as file, tarfile.open(fileobj=file, mode="w:gz") as archive:
        for name in names:
            archive.add(options.labels / f"{name}.png", f"{folder}/{name}.png")
    print(f"written  {options.out} ({len(names)} label images, comp{options.competition}_test_cls)")
    return options.out


def find_mistake(label: Path, photo: Path) -> tuple[str | None, bool]:
    """Why the server would refuse or misjudge a label image, and whether it shows any class."""
    import numpy as np
    from PIL import Image

    from datasets.voc import CLASS_NAMES
    from utils.image import PALETTE

    if not label.is_file():
        return "is missing: segment the whole list (--infer test)", False
    if not photo.is_file():
        return f"has no photo in {photo.parent}: unpack VOC2012test.tar there", False
    try:
        with Image.open(label) as image:
            image.load()
        with Image.open(photo) as picture:
            size = picture.size
    except Exception as error:  # decoders raise whatever the damage makes them trip over
        return f"cannot be read ({type(error).__name__})", False
    if image.format != "PNG":
        return f"is a {image.format}, which may have changed the indices: write PNG", False
    if image.mode != "P":
        return f"is no palette picture (mode {image.mode}), whose indices the server reads", False
    if image.size != size:
        return "has another size than its photo: segment at native size, without crop or padding", False
    indices = np.asarray(image)
    used = np.unique(indices)
    if used[-1] == 255:
        return "has ignored pixels (255): every pixel needs a class", False
    if used[-1] >= len(CLASS_NAMES):
        return f"has indices above {len(CLASS_NAMES) - 1}: is it of another data set?", False
    colours = np.array(image.getpalette("RGB")).reshape(-1, 3)
    if len(colours) <= used[-1] or (colours[used] != np.asarray(PALETTE)[used]).any():
        return "has another palette than VOC's: a program has changed it", False
    return None, bool(used[-1])


if __name__ == "__main__":
    command_line(Options, run, __doc__)
