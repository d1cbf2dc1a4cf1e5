"""What the stages of a pipeline made, side by side: a sheet per stage with a column for each one so far."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from datasets.base import Record, Split, WeakSegDataset
from datasets.context_decoupling import object_path
from engine.crf_labels import named
from engine.inference import LoadedMethod, load_method
from engine.panels import enlarged, panels_of, see
from engine.scores.evaluation import truth_path
from methods.base import FindsBoundaries, Predicts
from ops.labels import merge_readings
from utils.cam_files import ScoreFile, cam_path, label_path, load_cam, load_scores
from utils.drawing import SheetRow, cam_overlay, label_overlay, sheet, write_picture
from utils.image import normalize, read_mask, resize

COUNT = 6  # images of a sheet
OWN = ("CAM", "auxiliary CAM", "prediction")  # what is shown of a network
Panels = dict[str, np.ndarray]


@torch.no_grad()
def draw_stage(folders: Mapping[str, Path], split: Split, out: Path, device: torch.device | str) -> Path:
    """Write ``<out>/<stage>.jpg`` for the last of the stages; returns its path.

    Args:
        folders: output folders of the stages so far, by name.
        split: images to show, evenly spread; fewer if the split is smaller.
    """
    name, folder = list(folders.items())[-1]
    checkpoint = folder / "last.pth"
    loaded = load_method(checkpoint, device) if checkpoint.is_file() else None
    dataset, rows = WeakSegDataset(split), []
    for index in sorted({int(i) for i in np.linspace(0, len(split) - 1, COUNT)}):
        image_rgb, record = dataset[index]["image"], split.records[index]
        photo = image_rgb.permute(1, 2, 0).numpy()
        panels: Panels = {"image": photo}
        classes = set(record.tags or ())
        if truth_path(record):
            panels["truth"] = label_overlay(photo, record.read_mask())
        for stage, place in folders.items():
            panels |= made_by_stage(stage, place, record, photo)
        if label_path(folder, record.name).is_file():  # the legend names what was painted without a tag
            painted = np.bincount(read_mask(label_path(folder, record.name)).ravel(), minlength=256)
            known = (*range(1, split.num_classes), 255)
            classes |= {k for k in known if painted[k] >= 0.01 * painted.sum()}
        if loaded is not None:
            panels |= seen_by_network(name, loaded, record, image_rgb.to(device))
        note = "tags: " + (", ".join(split.class_names[k] for k in record.tags or ()) or "none")
        rows.append((record.name, panels, sorted(classes), note))
    titles = list(dict.fromkeys(title for _, panels, _, _ in rows for title in panels))
    lines = [SheetRow(n, [panels.get(t) for t in titles], classes, note) for n, panels, classes, note in rows]
    path = out / f"{name}.jpg"
    write_picture(path, sheet(lines, titles, split.class_names))
    return path


def made_by_stage(stage: str, folder: Path, record: Record, photo: np.ndarray) -> Panels:
    """What a stage wrote for an image: a label image, CAMs, label scores or an object; empty without any."""
    for class_id in record.tags or ():
        if object_path(folder, class_id, record.name).is_file():
            with Image.open(object_path(folder, class_id, record.name)) as item:
                grey = Image.new("RGB", item.size, "grey")
                grey.paste(item, mask=item)
            return {stage: np.asarray(grey)}
    if label_path(folder, record.name).is_file():
        return {stage: label_overlay(photo, read_mask(label_path(folder, record.name)))}
    path = cam_path(folder, record.name)
    if not path.is_file():
        return {}
    with np.load(path, allow_pickle=False) as arrays:
        kind = "scores" if "scores" in arrays else "cam"
    if kind == "scores":
        return {stage: label_overlay(photo, label_of_scores(load_scores(path)))}
    cams = load_cam(path)
    return {stage: cam_overlay(photo, enlarged(cams.cam, photo.shape[:2]), cams.class_ids.tolist())}


def label_of_scores(file: ScoreFile) -> np.ndarray:
    """The label (H, W) uint8 that an affinity network learns from: class ids, 255 where it is unsure."""
    return named(merge_readings(file.scores), torch.tensor([0, *file.class_ids.tolist()]))


def seen_by_network(stage: str, loaded: LoadedMethod, record: Record, image_rgb: Tensor) -> Panels:
    """What a trained network says of an image: CAM and segmentation, or boundaries."""
    if isinstance(loaded.method, FindsBoundaries):
        edge, _ = loaded.method.boundaries(normalize(image_rgb)[None])
        grey = (255 * (1 - resize(edge[None, None], image_rgb.shape[-2:])[0, 0])).round().byte()
        return {f"{stage}: boundaries": np.repeat(grey.cpu().numpy()[..., None], 3, 2)}
    if not isinstance(loaded.method, Predicts):  # it serves another stage and predicts nothing itself
        return {}
    panels, _ = panels_of(loaded, record, image_rgb, see(loaded, record, image_rgb, loaded.cfg.eval.size))
    return {f"{stage}: {title}": panels[title] for title in OWN if title in panels}
