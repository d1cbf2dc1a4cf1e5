"""Sheets for the eye: image, truth, CAM, auxiliary CAM, pseudo label and prediction side by side, classes by
colour; for SeCo also the local crops that it decomposes the image into, with their category tags.

    python tools/visualize.py --model_path logs/my_run/last.pth --infer val --count 12 --out sheets
    python tools/visualize.py --model_path logs/my_run/last.pth --names 2007_000033 --labels crf:crf

What is not there (masks, a decoder, tags) is left out. CAMs are those of the image's tags; each pixel has the
colour of its strongest class, as strong as the activation.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from torch import Tensor

from datasets.base import Record, Split, WeakSegDataset
from engine.inference import LoadedMethod, load_method
from engine.outputs import find_split
from engine.scores.report import has_mask
from methods.base import MakesPseudoLabels, Prediction, Predicts, finish_scores
from ops.cam import present_classes
from ops.crops import cut
from tools.options import checkpoint_parser, complete, data_overrides, parse
from utils.cam_files import label_path
from utils.cli import run_main
from utils.distributed import init_process_group
from utils.drawing import SheetRow, cam_overlay, label_overlay, sheet, tagged_tiles, write_picture
from utils.image import normalize, read_mask, resize
from utils.logging import progress_bar

TITLES = {
    "image": "image",
    "truth": "truth",
    "cam": "CAM",
    "aux_cam": "auxiliary CAM",
    "pseudo_label": "pseudo label",
    "seg": "prediction",
    "crops": "crops and their tags",
}

LEGEND_SHARE = (
    0.01  # of the image: a class that the prediction gives fewer pixels is not explained in the legend
)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = checkpoint_parser(__doc__)
    p.add_argument(
        "--names",
        help="images to show, separated by commas; default: --count of them, evenly spread over the split",
    )
    p.add_argument("--count", type=int, default=12, help="number of images (default %(default)s)")
    p.add_argument("--rows", type=int, default=6, help="images per sheet (default %(default)s)")
    p.add_argument("--size", type=int, help="side of the square that the network sees; default: eval.size")
    p.add_argument(
        "--labels",
        nargs="*",
        default=[],
        metavar="TITLE:FOLDER",
        help="further columns from folders of label images",
    )
    p.add_argument("--out", help="output folder; default: sheets/ beside the checkpoint")
    p.add_argument("--device", default="auto", help="auto, cpu or cuda")
    return p


@torch.no_grad()
def run(cfg: Mapping[str, Any]) -> Path:
    """Draw the sheets; returns their folder.

    Args:
        cfg: the flags of the command line by name; those left out keep their defaults.
    """
    options = complete(parser(), cfg)
    device = init_process_group(options.device)
    loaded = load_method(options.model_path, device, data_overrides(options))
    split = find_split(loaded, options.infer)
    dataset = WeakSegDataset(split)
    folders = _label_folders(options.labels)
    columns, rows = [*TITLES, *folders], []
    size = options.size or loaded.cfg.eval.size
    for index in progress_bar(
        _chosen(split, options.names, options.count), desc="draw", unit="img", leave=False
    ):
        sample = dataset[index]
        panels, classes = panels_of(loaded, split.records[index], sample["image"].to(device), size)
        for title, folder in folders.items():
            path = label_path(folder, split.records[index].name)
            if path.is_file():
                panels[title] = label_overlay(panels["image"], read_mask(path))
        tags = split.records[index].tags
        note = "" if tags is None else "tags: " + (", ".join(split.class_names[k] for k in tags) or "none")
        rows.append((split.records[index].name, panels, classes, note))

    shown = [column for column in columns if any(column in panels for _, panels, _, _ in rows)]
    titles = [TITLES.get(column, column) for column in shown]
    out = Path(options.out) if options.out else loaded.path.parent / "sheets"
    for number, start in enumerate(range(0, len(rows), options.rows), start=1):
        lines = [
            SheetRow(name, [panels.get(column) for column in shown], classes, note)
            for name, panels, classes, note in rows[start : start + options.rows]
        ]
        path = out / f"{loaded.path.stem}_{Path(split.name).stem}_{number:02d}.png"
        write_picture(path, sheet(lines, titles, split.class_names))
        print(path)
    return out


def panels_of(
    loaded: LoadedMethod, record: Record, image_rgb: Tensor, size: int
) -> tuple[dict[str, np.ndarray], list[int]]:
    """Pictures by column for one (3, H, W) uint8 image, and the classes that occur in them."""
    height, width = image_rgb.shape[-2:]
    photo = image_rgb.permute(1, 2, 0).cpu().numpy()
    image = resize(normalize(image_rgb)[None], (size, size))
    if not isinstance(loaded.method, Predicts):
        raise ValueError(f"{type(loaded.method).__name__} predicts nothing that could be drawn")
    out = loaded.method.predict(image, loaded.method.cam_scales)
    panels, classes = {"image": photo}, set()
    if has_mask(record):
        assert record.mask is not None
        truth = read_mask(record.mask)
        panels["truth"] = label_overlay(photo, truth)
        classes |= set(np.unique(truth).tolist()) - {0}
    tags = (
        list(record.tags)
        if record.tags is not None
        else loaded.method.present(out.class_logits[0]).nonzero()[:, 0].add(1).tolist()
    )
    classes |= set(tags)
    for name, cam in (("cam", out.cam), ("aux_cam", out.aux_cam)):
        if cam is not None:
            chosen = (
                resize(cam[:, [k - 1 for k in tags]].float(), (height, width))[0]
                if tags
                else cam.new_zeros(0, height, width)
            )
            panels[name] = cam_overlay(photo, chosen.cpu().numpy(), tags)
    pseudo = None
    if isinstance(loaded.method, MakesPseudoLabels):
        class_label = _class_label(loaded, image, tags)
        pseudo = loaded.method.decoder_target(image, out, class_label, loaded.step or 0)
    if pseudo is not None:
        label = torch.nn.functional.interpolate(
            pseudo[:, None].float(), (height, width), mode="nearest-exact"
        )[0, 0]
        panels["pseudo_label"] = label_overlay(photo, label.to(torch.uint8).cpu().numpy())
        classes |= set(pseudo.unique().tolist()) - {0}
    tiles = _crops(loaded, image_rgb, image, out, tags)
    if tiles is not None:
        panels["crops"] = tiles
    if out.seg_logits is not None:
        scores = resize(out.seg_logits.float(), (height, width))
        scores = finish_scores(loaded.method, scores, out.class_logits[:, None].float())
        label = scores.argmax(1)[0].to(torch.uint8)
        panels["seg"] = label_overlay(photo, label.cpu().numpy())
        shares = torch.bincount(label.flatten().long(), minlength=loaded.method.num_classes) / label.numel()
        classes |= set((shares >= LEGEND_SHARE).nonzero()[:, 0].tolist()) - {0}
    return panels, sorted(classes)


def _crops(
    loaded: LoadedMethod, image_rgb: Tensor, image: Tensor, out: Prediction, tags: Sequence[int]
) -> np.ndarray | None:
    """The image and its local crops as a training step would take and tag them; None for other methods."""
    method = loaded.method
    if not hasattr(method, "decompose"):
        return None
    present = present_classes(_class_label(loaded, image, tags))
    cam = present.select(getattr(out, method.tag_source(loaded.step or 0)))
    whole = torch.tensor([[0, image.shape[2], 0, image.shape[3]]], device=image.device)
    positions, crop_tags = method.decompose({"valid_box": whole, "sample_seed": torch.zeros(1)}, cam, present)
    square = resize(image_rgb[None].float(), image.shape[2:]).round().to(torch.uint8)
    parts = cut(square, positions, method.local_crop_size)[:, 0]  # (V, 3, s, s)
    pictures = [part.permute(1, 2, 0).cpu().numpy() for part in (square[0], *parts)]
    names = {-1: "mixed", **dict(enumerate(loaded.class_names))}
    shown = crop_tags[0, 1:].tolist()  # one of the two equal tags of the whole image, then the crops'
    titles = ["image", *(names[tag] for tag in shown[1:])]
    return tagged_tiles(pictures, list(zip(shown, titles, strict=True)))


def _class_label(loaded: LoadedMethod, image: Tensor, tags: Sequence[int]) -> Tensor:
    """Image tags as (1, C)."""
    class_label = image.new_zeros(1, loaded.method.num_classes - 1)
    class_label[0, [k - 1 for k in tags]] = 1
    return class_label


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
    run_main(lambda: run(parse(parser())))
