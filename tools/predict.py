"""Find classes in photos: masks, pictures with outlines and a legend, and what was found as JSON.

    python tools/predict.py photo.jpg --model_path logs/my_run/last.pth
    python tools/predict.py photos "more/*.png" --model_path logs/my_run/last.pth --tags "dog;sofa"

A photo <name>.jpg gives <name>.png (a palette PNG of class indices), <name>.json (class names, areas, scores,
model, protocol) and overlay/<name>.jpg in the folder ``--out``, beside what is there. A photo that cannot be
read is named when all others are done, and the exit code is 2.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from engine.config.options import command_line, option


@dataclass(kw_only=True)
class Options:
    """Options of the tool."""

    photos: list[str] = option(meaning="photos, folders of photos, patterns in quotes", positional=True)
    model_path: Path = option(
        meaning="checkpoint (.pth, .safetensors), also of a published program", reads=True
    )
    out: Path = option(Path("masks"), "output folder")
    tags: str | None = option(
        None,
        "what the photos show, 'dog;sofa', or a file of tags (docs/data.md); other classes are ruled out",
    )
    label: str = option(
        "auto",
        "where labels come from: the decoder (seg), CAMs (cam), or the decoder if it was trained (auto)",
        choices=("auto", "seg", "cam"),
    )
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

    photos = _named(_photo_files(options.photos))
    model = tag2mask(options.model_path, options.label, options.crf, options.device, options.overrides)
    tags_of = _tags(options.tags, model.names, photos)
    if not options.json:
        print(model.loaded.describe())
        print(f"output   {options.out}   ({len(photos)} photos)")
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
    from utils.files import read_json, write_json
    from utils.image import write_mask
    from utils.outlines import outlined_overlay

    about = folder / f"{name}.json"
    if about.is_file() and (other := read_json(about).get("image")) != str(path):
        raise FileExistsError(f"{path}: {about} is the result of {other}, choose another --out")
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
    write_mask(folder / f"{name}.png", masks.label)
    write_picture(folder / "overlay" / f"{name}.jpg", outlined_overlay(image, masks.label, masks.names))
    write_json(about, record)
    return record


def _photo_files(items: Sequence[str]) -> list[Path]:
    """The pictures that photos, folders and patterns name, damaged ones and dangling links among them."""
    import os
    from glob import glob

    from datasets.pictures import FOREIGN_SUFFIXES, IMAGE_SUFFIXES

    found: list[Path] = []
    for item in items:
        path = Path(item).expanduser()
        if path.is_dir():
            visible = [p for p in sorted(path.iterdir()) if p.name[0] != "."]
            inside = [p for p in visible if p.suffix.lower() in (*IMAGE_SUFFIXES, *FOREIGN_SUFFIXES)]
        else:
            inside = [path] if os.path.lexists(path) else sorted(map(Path, glob(str(path), recursive=True)))
        photos = [p.absolute() for p in inside if not p.is_dir()]
        if not photos:
            raise FileNotFoundError(f"there is no photo {item}")
        found += photos
    if not found:
        raise ValueError("name photos, folders of photos or patterns")
    return list(dict.fromkeys(found))


def _named(paths: Sequence[Path]) -> dict[str, Path]:
    """Photos by their stems, or where two are equal, by their paths below the folder of all."""
    import os

    folder = os.path.commonpath([path.parent for path in paths])
    below = [path.relative_to(folder) for path in paths]
    names = [path.stem for path in paths]
    for longer in ([p.with_suffix("").as_posix() for p in below], [p.as_posix() for p in below]):
        if len(set(names)) < len(paths):
            names = longer
    return dict(zip(names, paths))


def _tags(
    text: str | None, class_names: Sequence[str], photos: dict[str, Path]
) -> dict[str, list[str] | None]:
    """Tags by name of the photo, as ``--tags`` says."""
    from datasets.tags import read_tags

    if text is None:
        return {}
    if Path(text).suffix.lower() not in (".csv", ".json", ".txt"):
        words = [word.strip() for word in text.split(";") if word.strip()]
        return {name: words for name in photos}
    known = read_tags(text, class_names)
    if missing := [name for name, path in photos.items() if path.stem not in known]:
        raise ValueError(f"{text} has no line for {len(missing)} of {len(photos)} photos, first {missing[0]}")
    return {name: [class_names[k] for k in known[path.stem]] for name, path in photos.items()}


if __name__ == "__main__":
    command_line(Options, run, __doc__)
