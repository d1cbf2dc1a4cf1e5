"""What a network saw in a split: ``<run>/seen/<split>.json``, which reports draw from without the data set.

It holds the numbers of every image (`Details`), and of some images a photo and maps. A map is an RGB PNG with
the class id as red (its upper byte as blue) and its score as green, 255 for labels; both are small and lie in
the JSON as data URIs.
"""

import base64
import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from datasets.base import Record, Split, WeakSegDataset
from engine.scores.base import OUTPUTS
from engine.scores.cam_sweep import CAMS
from engine.scores.evaluation import Evaluation, truth_path
from engine.scores.records import short_name
from engine.validation import predicted_image
from methods.base import MakesPseudoLabels, Method, Predicts
from utils.drawing import cam_overlay, label_overlay
from utils.files import read_json, write_atomic
from utils.image import normalize, resize
from utils.precision import autocast

FORMAT = "tag2mask-seen/1"
SIDE = 256  # longest side of a stored picture, pixels
SEEN = "seen"  # folder in that of a run
EACH = 6  # images that are evenly spread over the split, and as many best, worst and most changed ones


def seen_path(folder: Path, split: Split) -> Path:
    """Where a run folder keeps what was seen in a split."""
    return folder / SEEN / f"{short_name(split)}.json"


def write_seen(folder: Path, split: Split, content: Mapping[str, Any], samples: Sequence[Any]) -> None:
    """Write what a report needs to draw a split."""
    head = {"format": FORMAT, "split": short_name(split), "class_names": split.class_names}
    text = json.dumps({**head, **content, "samples": samples}, allow_nan=False)
    write_atomic(seen_path(folder, split), text.encode())


def record_seen(
    folder: Path,
    evaluation: Evaluation,
    method: Method,
    dataset: WeakSegDataset,
    *,
    step: int,
    size: int,
    device: torch.device | str,
    precision: str = "fp32",
) -> None:
    """Write the numbers of a validation and draw some of its images."""
    assert evaluation.details is not None
    content, path = evaluation.details.content(), seen_path(folder, dataset.split)
    before = read_json(path) if path.is_file() else {"step": -1}
    if before["step"] >= step:  # a repeated validation
        before = before.get("before") or {"step": -1}
    is_same = before.get("names") == content["names"]
    content["before"] = {key: before[key] for key in ("step", "names", "iou")} if is_same else None
    drawn = {"device": device, "precision": precision}
    record_examples(folder, method, dataset, chosen(content), content, step=step, size=size, **drawn)


def record_examples(
    folder: Path,
    method: Method,
    dataset: WeakSegDataset,
    indices: Iterable[int],
    content: Mapping[str, Any] = {},
    *,
    step: int,
    size: int,
    **options: Any,
) -> None:
    """Draw some images of a set, ``options`` as of `draw`; ``content`` are numbers of all its images."""
    samples = [draw(method, dataset, i, step=step, size=size, **options) for i in indices]
    settings = {"step": step, "size": size, "threshold": method.background_threshold}
    write_seen(folder, dataset.split, {**settings, **content}, samples)


def chosen(content: Mapping[str, Any], count: int = EACH) -> list[int]:
    """Indices of the images to draw: evenly spread, best, worst and most changed ones."""
    total, iou = len(content["names"]), content["iou"]
    picked = spread(total, count)
    output = next((name for name in ("seg", *OUTPUTS) if name in iou), None)
    if output is not None:
        now = iou[output]
        ranked = sorted((i for i in range(total) if now[i] is not None), key=lambda i: now[i])
        picked |= {*ranked[:count], *ranked[-count:]}
        if content["before"] is not None and output in content["before"]["iou"]:
            old = content["before"]["iou"][output]
            changes = {i: abs(now[i] - old[i]) for i in ranked if old[i] is not None}
            picked |= set(sorted(changes, key=lambda i: -changes[i])[:count])
    return sorted(picked)


def spread(total: int, count: int) -> set[int]:
    """Evenly spread indices."""
    return {int(i) for i in np.linspace(0, total - 1, min(count, total))}


@torch.no_grad()
def draw(
    method: Method,
    dataset: WeakSegDataset,
    index: int,
    *,
    step: int,
    size: int,
    device: torch.device | str,
    precision: str = "fp32",
) -> dict[str, Any]:
    """Photo and maps of an image of a set without transform; CAMs of unknown tags are of predicted ones."""
    assert isinstance(method, Predicts)
    sample, record = dataset[index], dataset.split.records[index]
    image_rgb = sample["image"].to(device)
    image, known, target = resize(normalize(image_rgb)[None], (size, size)), sample.get("class_label"), None
    with autocast(torch.device(device), precision):
        out = method.predict(image, method.cam_scales)
        tags = method.present(out.class_logits[0]).float() if known is None else known.to(device)
        if isinstance(method, MakesPseudoLabels):
            target = method.decoder_target(image, out, tags[None], step)
    found = predicted_image(method, out, 0, {"image": image_rgb, "class_label": tags})
    maps = truth_of(record) | {name: encoded(label, score) for name, (score, label) in found.cams.items()}
    if target is not None:
        same = F.interpolate(target[:, None].float(), image_rgb.shape[-2:], mode="nearest-exact")
        maps["pseudo_label"] = encoded(same[0, 0])
    if "seg" in found.labels:
        maps["seg"] = encoded(found.labels["seg"])
    ids = (out.class_logits[0] > 0).nonzero()[:, 0] + 1
    drawn = {"name": record.name, "tags": record.tags, "found": ids.tolist()}
    return {**drawn, "image": photo(image_rgb), "maps": maps}


def truth_of(record: Record) -> dict[str, str]:
    """The map of the ground truth of an image, if there is any."""
    return {"truth": encoded(torch.from_numpy(record.read_mask()))} if truth_path(record) else {}


def photo(image_rgb: Tensor) -> str:
    """A small version of an image (3, H, W) uint8 as a data URI."""
    picture = Image.fromarray(image_rgb.permute(1, 2, 0).cpu().numpy())
    picture.thumbnail((SIDE, SIDE))
    return _uri(picture, "WEBP")


def encoded(label: Tensor, score: Tensor | None = None) -> str:
    """A small version of class ids (H, W), 255 ignored, and their scores (H, W) in [0, 1] as a data URI."""
    ids = label.cpu().numpy().astype(np.uint16)
    scores = np.full_like(ids, 255) if score is None else (255 * score.float().cpu().numpy()).round()
    picture = Image.fromarray(np.stack([ids & 255, scores, ids >> 8], -1).astype(np.uint8))
    picture.thumbnail((SIDE, SIDE), Image.Resampling.NEAREST)
    return _uri(picture, "PNG")


def overlays(content: Mapping[str, Any], count: int = EACH) -> Iterator[tuple[str, np.ndarray]]:
    """Name and picture of the images that every validation draws: photo and maps side by side."""
    all_names = content.get("names", [])
    names = {all_names[i] for i in spread(len(all_names), count)}
    for sample in content["samples"]:
        if sample["name"] in names:
            image = np.asarray(_decoded(sample["image"]))
            parts = [image]
            for title, uri in sample["maps"].items():
                low, score, high = np.moveaxis(np.asarray(_decoded(uri)), -1, 0)
                ids = low + 256 * high.astype(int)
                classes = [int(k) for k in np.unique(ids)]
                cams = np.stack([(ids == k) * (score / 255) for k in classes])
                parts.append(
                    cam_overlay(image, cams, classes) if title in CAMS else label_overlay(image, ids)
                )
            yield sample["name"], np.concatenate(parts, 1)


def _decoded(uri: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))).convert("RGB")


def _uri(picture: Image.Image, kind: str) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, kind, quality=80, optimize=True)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"
