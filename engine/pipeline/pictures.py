"""What the stages of a pipeline made of some images, for its report: a column for each stage."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from datasets.base import Record, Split, WeakSegDataset
from datasets.context_decoupling import object_path
from engine.crf_labels import named
from engine.inference import LoadedMethod, load_method
from engine.seen import EACH, draw, encoded, photo, seen_path, spread, truth_of, write_seen
from methods.base import FindsBoundaries, Predicts
from ops.cam import strongest_class
from ops.labels import merge_readings
from utils.cam_files import cam_path, label_path, load_cam, load_scores
from utils.image import IGNORE_INDEX, normalize, read_mask, resize


@torch.no_grad()
def draw_stage(folder: Path, split: Split, device: torch.device | str) -> None:
    """Write ``<folder>/seen/<split>.json`` of a finished stage, unless its validation did.

    Args:
        split: images to show, evenly spread.
    """
    if seen_path(folder, split).is_file():
        return
    checkpoint = folder / "last.pth"
    loaded = load_method(checkpoint, device) if checkpoint.is_file() else None
    dataset, samples = WeakSegDataset(split), []
    for index in sorted(spread(len(split), EACH)):
        image_rgb, record = dataset[index]["image"], split.records[index]
        if loaded is not None and isinstance(loaded.method, Predicts):
            size = loaded.cfg.eval.size
            samples.append(
                draw(loaded.method, dataset, index, step=loaded.step or 0, size=size, device=device)
            )
            continue
        maps = truth_of(record) | made_by_stage(folder, record, image_rgb.shape[-2:])
        if loaded is not None and isinstance(loaded.method, FindsBoundaries):
            maps["boundaries"] = boundaries(loaded, image_rgb.to(device))
        picture = mined_object(folder, record)
        image = photo(image_rgb if picture is None else picture)
        samples.append({"name": record.name, "tags": record.tags, "image": image, "maps": maps})
    write_seen(folder, split, {"threshold": None}, samples)


def made_by_stage(folder: Path, record: Record, size: tuple[int, ...]) -> dict[str, str]:
    """The map that a stage wrote for an image: a label, CAMs or label scores; empty without any."""
    if label_path(folder, record.name).is_file():
        return {"label": encoded(torch.from_numpy(read_mask(label_path(folder, record.name))))}
    path = cam_path(folder, record.name)
    if not path.is_file():
        return {}
    with np.load(path, allow_pickle=False) as arrays:
        kind = "scores" if "scores" in arrays else "cam"
    if kind == "scores":
        file = load_scores(path)
        readings = named(merge_readings(file.scores), torch.tensor([0, *file.class_ids.tolist()]))
        return {"label": encoded(torch.from_numpy(readings))}
    cams = load_cam(path)
    score, label = strongest_class(cams.cam, cams.class_ids, size)
    return {"cam": encoded(label, score)}


def mined_object(folder: Path, record: Record) -> Tensor | None:
    """The object that a stage cut out of an image (3, H, W), on grey."""
    for class_id in record.tags or ():
        if object_path(folder, class_id, record.name).is_file():
            with Image.open(object_path(folder, class_id, record.name)) as item:
                grey = Image.new("RGB", item.size, "grey")
                grey.paste(item, mask=item)
            return torch.from_numpy(np.array(grey)).permute(2, 0, 1)
    return None


def boundaries(loaded: LoadedMethod, image_rgb: Tensor) -> str:
    """A map of the boundaries that a network sees."""
    edge, _ = loaded.method.boundaries(normalize(image_rgb)[None])  # type: ignore[operator]
    score = resize(edge[None, None], image_rgb.shape[-2:])[0, 0]
    return encoded(torch.full_like(score, IGNORE_INDEX), score)
