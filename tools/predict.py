"""Find classes in photos: masks, pictures with outlines and a legend, and what was found as JSON.

    python tools/predict.py photo.jpg --model_path logs/my_run/last.pth
    python tools/predict.py photos "more/*.png" --model_path logs/my_run/last.pth --tags "dog;sofa"

A photo <name>.jpg gives <name>.png (class indices), <name>.json and overlay/<name>.jpg in ``--out``, where
<name> is its path below the folder that is given (docs/use.md). Unreadable photos are named at the end.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from engine.config.options import command_line, option


@dataclass(kw_only=True)
class Options:
    photos: list[str] = option(meaning="photos, folders of photos, patterns in quotes", positional=True)
    model_path: Path = option(meaning="checkpoint, also of a published program", reads=True)
    out: Path = option(Path("masks"), "output folder")
    tags: str | None = option(None, "what the photos show, 'dog;sofa', or a file of tags: rules classes out")
    label: str = option("auto", "of the decoder, if it was trained, or CAMs", choices=("auto", "seg", "cam"))
    crf: bool = option(False, "refine by infer.refiner, or else by the DenseCRF of the method's paper")
    json: bool = option(False, "print one JSON object per photo and nothing else")
    device: str = option("auto", "auto, cpu or cuda", free=True)
    overrides: list[str] = option([], "changes of the checkpoint's config", free=True)


def run(options: Options) -> Path:
    """Predict every photo; returns the output folder.

    Raises:
        UnreadableImageError: at the end, for the photos that could not be read.
    """
    import json

    from engine.predictor import tag2mask
    from utils.cli import message_of
    from utils.image import UnreadableImageError
    from utils.logging import progress_bar

    photos = _photos(options.photos)
    earlier = _earlier_results(options.photos, photos, options.out)
    model = tag2mask(options.model_path, options.label, options.crf, options.device, options.overrides)
    tags_of = _tags(options.tags, model.names, photos)
    if not options.json:
        print(model.loaded.describe())
        print(f"output   {options.out}   ({len(photos)} photos, {earlier} earlier results are replaced)")
    failed = []
    for name, path in progress_bar(photos.items(), desc="predict", unit="img", disable=options.json):
        try:
            record = _predict(model, path, tags_of.get(name), options.out, name)
        except (UnreadableImageError, OSError) as error:
            failed.append(message_of(error))
            continue
        if options.json:
            print(json.dumps(record), flush=True)
        else:
            shown = ", ".join(f"{key} {area:.1%}" for key, area in record["area"].items())
            print(f"{name:<24} {shown}")
    if failed:
        raise UnreadableImageError(
            f"{len(failed)} of {len(photos)} photos: {'; '.join(failed)}. All others are done"
        )
    return options.out


def _predict(model: Any, path: Path, tags: Sequence[str] | None, folder: Path, name: str) -> dict[str, Any]:
    """Write the files of a photo; returns its record."""
    from utils.drawing import write_picture
    from utils.files import write_json
    from utils.image import write_mask
    from utils.outlines import outlined_overlay

    image = model.pixels(path)
    masks = model.predict(image, tags)
    record = {
        "format": "tag2mask-prediction/1",
        "image": str(path),
        "size": list(masks.label.shape),
        "class_names": list(masks.names),
        "tags": tags,
        "area": masks.area,
        "score": masks.score,
        "protocol": masks.protocol,
        "model": model.loaded.provenance(),
    }
    write_json(folder / f"{name}.json", record)  # first: it says whose the other files are
    write_mask(folder / f"{name}.png", masks.label)
    write_picture(folder / "overlay" / f"{name}.jpg", outlined_overlay(image, masks.label, masks.names))
    return record


def _photos(items: Sequence[str]) -> dict[str, Path]:
    """Photos by name: the path, without suffix, below the folder or the fixed start of the pattern."""
    import os
    from glob import glob, has_magic
    from itertools import takewhile

    from datasets.custom import find_images
    from datasets.lists import nfc

    photos: dict[str, Path] = {}
    for path in (Path(item).expanduser() for item in items):
        if path.is_dir():
            named = list(find_images(path).items())
        else:
            folder, files = path.parent, [path]
            if not os.path.lexists(path):
                folder = Path(*takewhile(lambda part: not has_magic(part), path.parts))
                files = [p for p in map(Path, sorted(glob(str(path), recursive=True))) if not p.is_dir()]
            named = [(nfc(p.relative_to(folder).with_suffix("").as_posix()), p) for p in files]
        if not named:
            raise FileNotFoundError(f"there is no photo {path}")
        for name, file in named:
            if (other := photos.setdefault(name, file.absolute())) != file.absolute():
                raise ValueError(
                    f"{other} and {file} would both be '{name}': rename one, give the folder above both, or "
                    "give each a run with another --out"
                )
    if not photos:
        raise ValueError("name photos, folders of photos or patterns")
    return photos


def _earlier_results(items: Sequence[str], photos: dict[str, Path], out: Path) -> int:
    """How many photos have results in the folder; a folder where other files would be replaced is refused."""
    from utils.files import read_json

    folder, given = out.resolve(), [Path(item).expanduser() for item in items]
    among = [path for path in given if path.is_dir() and folder.is_relative_to(path.resolve())]
    among += [path.parent for path in photos.values() if path.parent.resolve() == folder]
    if among:
        raise ValueError(f"results in {out} would be among the photos of {among[0]}: give another --out")
    count = 0
    for name, path in photos.items():
        about = out / f"{name}.json"
        files = [file for file in (about, out / f"{name}.png", out / f"overlay/{name}.jpg") if file.exists()]
        if files and (not about.is_file() or read_json(about).get("image") != str(path)):
            raise FileExistsError(f"{files[0]} is not a result of {path}: give another --out")
        count += bool(files)
    return count


def _tags(
    text: str | None, class_names: Sequence[str], photos: dict[str, Path]
) -> dict[str, list[str] | None]:
    """Tags by name of the photo, as ``--tags`` says."""
    from datasets.custom import aliases_of
    from datasets.lists import some
    from datasets.tags import read_tags, split_tags
    from utils.logging import LOGGER

    if text is None:
        return {}
    if Path(text).suffix.lower() not in (".csv", ".json", ".txt"):
        return dict.fromkeys(photos, split_tags(text))
    names = aliases_of(photos)
    known = {names[image]: ids for image, ids in read_tags(text, class_names).items() if image in names}
    if missing := [name for name in photos if name not in known]:
        lacking = f"{text} has no line for {some(missing, len(photos), 'photos')}"
        if len(missing) == len(photos):
            raise ValueError(f"{lacking}: give the folder below which the paths of its lines are")
        LOGGER.warning(f"warning  {lacking}: segmented without tags")
    return {name: [class_names[k] for k in ids] for name, ids in known.items()}


if __name__ == "__main__":
    command_line(Options, run, __doc__)
