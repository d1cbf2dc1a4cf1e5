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

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from torch import Tensor

from datasets.base import Split, WeakSegDataset
from engine.config.common import CheckpointOptions
from engine.config.options import command_line, option
from engine.inference import LoadedMethod, load_method
from engine.outputs import find_split
from engine.panels import Seen, panels_of, see
from methods.base import Decomposes
from ops.cam import present_classes
from ops.crops import cut
from utils.cam_files import label_path
from utils.distributed import init_process_group
from utils.drawing import SheetRow, label_overlay, sheet, tagged_tiles, write_picture
from utils.image import read_mask, resize
from utils.logging import progress_bar

TITLES = ("image", "truth", "CAM", "auxiliary CAM", "pseudo label", "prediction", "crops and their tags")


@dataclass(kw_only=True)
class Options(CheckpointOptions):
    """What the tool is told."""

    names: str | None = option(
        None,
        "images to show, separated by commas; default: --count of them, evenly spread over the split",
    )
    count: int = option(12, "number of images")
    rows: int = option(6, "images per sheet", least=1)
    size: int | None = option(None, "side of the square that the network sees; default: eval.size", least=1)
    labels: list[str] = option([], "further columns from folders of label images: TITLE:FOLDER")
    out: Path | None = option(None, "output folder; default: sheets/ beside the checkpoint")
    device: str = option("auto", "auto, cpu or cuda", free=True)


@torch.no_grad()
def run(options: Options) -> Path:
    """Draw the sheets; returns their folder."""
    device = init_process_group(options.device)
    loaded = load_method(options.model_path, device, options.changes())
    split = find_split(loaded, options.infer)
    dataset = WeakSegDataset(split)
    folders = _label_folders(options.labels)
    columns, rows = [*TITLES, *folders], []
    size = options.size or loaded.cfg.eval.size
    for index in progress_bar(
        _chosen(split, options.names, options.count), desc="draw", unit="img", leave=False
    ):
        sample = dataset[index]
        image_rgb = sample["image"].to(device)
        seen = see(loaded, split.records[index], image_rgb, size)
        panels, classes = panels_of(loaded, split.records[index], image_rgb, seen)
        if (crops := _crops(loaded, image_rgb, seen)) is not None:
            panels["crops and their tags"] = crops
        for title, folder in folders.items():
            path = label_path(folder, split.records[index].name)
            if path.is_file():
                panels[title] = label_overlay(panels["image"], read_mask(path))
        tags = split.records[index].tags
        note = "" if tags is None else "tags: " + (", ".join(split.class_names[k] for k in tags) or "none")
        rows.append((split.records[index].name, panels, classes, note))

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


def _crops(loaded: LoadedMethod, image_rgb: Tensor, seen: Seen) -> np.ndarray | None:
    """The image and its local crops as a training step would take and tag them; None for other methods."""
    method, size = loaded.method, seen.image.shape[2:]
    if not isinstance(method, Decomposes):
        return None
    present = present_classes(seen.class_label)
    cam = present.select(getattr(seen.prediction, method.tag_source(loaded.step or 0)))
    whole = torch.tensor([[0, size[0], 0, size[1]]], device=cam.device)
    positions, crop_tags = method.decompose({"valid_box": whole, "sample_seed": torch.zeros(1)}, cam, present)
    square = resize(image_rgb[None].float(), size).round().to(torch.uint8)
    parts = cut(square, positions, method.local_crop_size)[:, 0]  # (V, 3, s, s)
    pictures = [part.permute(1, 2, 0).cpu().numpy() for part in (square[0], *parts)]
    names = {-1: "mixed", **dict(enumerate(loaded.class_names))}
    shown = crop_tags[0, 1:].tolist()  # one of the two equal tags of the whole image, then the crops'
    titles = ["image", *(names[tag] for tag in shown[1:])]
    return tagged_tiles(pictures, list(zip(shown, titles, strict=True)))


def _chosen(split: Split, names: str | None, count: int) -> list[int]:
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
