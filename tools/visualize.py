"""Sheets for the eye: image, truth, CAM, auxiliary CAM, pseudo label and prediction side by side, classes by
colour; for SeCo also the local crops that it decomposes the image into, with their category tags.

    python tools/visualize.py --model_path logs/my_run/last.pth --infer val --count 12 --out sheets
    python tools/visualize.py --model_path logs/my_run/last.pth --names 2007_000033 --labels crf:crf

What is not there (masks, a decoder, tags) is left out. CAMs are those of the image's tags; each pixel has the
colour of its strongest class, as strong as the activation.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from engine.config.common import CheckpointOptions
from engine.config.options import command_line, option

TITLES = ("image", "truth", "CAM", "auxiliary CAM", "pseudo label", "prediction", "crops and their tags")


@dataclass(kw_only=True)
class Options(CheckpointOptions):
    """Options of the tool."""

    names: str | None = option(
        None, "images to show, separated by commas; default: --count of them, evenly spread over the split"
    )
    count: int = option(12, "number of images")
    rows: int = option(6, "images per sheet", least=1)
    size: int | None = option(None, "side of the square that the network sees; default: eval.size", least=1)
    labels: list[str] = option([], "further columns from folders of label images: TITLE:FOLDER")
    out: Path | None = option(None, "output folder; default: sheets/ beside the checkpoint")


def run(options: Options) -> Path:
    """Draw the sheets; returns their folder."""
    from datasets.base import WeakSegDataset
    from engine.outputs import load_inputs
    from engine.panels import crop_tiles, panels_of, see
    from utils.cam_files import label_path
    from utils.drawing import SheetRow, label_overlay, sheet, write_picture
    from utils.image import read_mask
    from utils.logging import progress_bar

    device, loaded, split = load_inputs(options)
    dataset = WeakSegDataset(split)
    folders = _label_folders(options.labels)
    columns, rows = [*TITLES, *folders], []
    size = options.size or loaded.cfg.eval.size
    chosen = _chosen(split, options.names, options.count)
    for index in progress_bar(chosen, desc="draw", unit="img", leave=False):
        record, image_rgb = split.records[index], dataset[index]["image"].to(device)
        seen = see(loaded, record, image_rgb, size)
        panels, classes = panels_of(loaded, record, image_rgb, seen)
        if (crops := crop_tiles(loaded, image_rgb, seen)) is not None:
            panels["crops and their tags"] = crops
        for title, folder in folders.items():
            path = label_path(folder, record.name)
            if path.is_file():
                panels[title] = label_overlay(panels["image"], read_mask(path))
        tags = record.tags
        note = "" if tags is None else "tags: " + (", ".join(split.class_names[k] for k in tags) or "none")
        rows.append((record.name, panels, classes, note))

    shown = [column for column in columns if any(column in panels for _, panels, _, _ in rows)]
    out = options.out or loaded.path.parent / "sheets"
    for number, start in enumerate(range(0, len(rows), options.rows), start=1):
        lines = [
            SheetRow(name, [panels.get(column) for column in shown], classes, note)
            for name, panels, classes, note in rows[start : start + options.rows]
        ]
        path = out / f"{loaded.path.stem}_{Path(split.name).stem}_{number:02d}.png"
        write_picture(path, sheet(lines, shown, split.class_names))
        print(path)
    return out


def _chosen(split: Any, names: str | None, count: int) -> list[int]:
    import numpy as np

    if names is None:
        count = min(count, len(split))
        return [int(i) for i in np.linspace(0, len(split) - 1, count).round()] if count else []
    index_of = {record.name: i for i, record in enumerate(split.records)}
    unknown = [name for name in names.split(",") if name not in index_of]
    if unknown:
        raise ValueError(f"split '{split.name}' has no image '{unknown[0]}'")
    return [index_of[name] for name in names.split(",")]


def _label_folders(items: Sequence[str]) -> dict[str, Path]:
    folders = {}
    for item in items:
        title, colon, folder = item.partition(":")
        if not colon or not Path(folder).is_dir():
            raise ValueError(f"--labels {item} is not TITLE:FOLDER with a folder that exists")
        folders[title] = Path(folder)
    return folders


if __name__ == "__main__":
    command_line(Options, run, __doc__)
