"""Segment images with a checkpoint: palette PNGs, and scores where there are masks.

    python tools/infer_seg.py --model_path logs/my_run/last.pth --infer val
    python tools/infer_seg.py --model_path logs/my_run/last.pth --infer photo.jpg --out out

The config comes out of the checkpoint; ``key=value`` changes it (data.root=..., data.options.masks=...). Run
again, it skips what is finished. Under torchrun (run_evaluate_seg_*.sh) the images are shared out over the
processes.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from datasets.base import Record, Sample, WeakSegDataset
from engine.config.common import ImageOptions
from engine.config.load import to_plain
from engine.config.options import command_line, option
from engine.inference import (
    MERGES,
    LoadedMethod,
    for_each_image,
    is_photo,
    load_method,
    multi_scale_segment,
)
from engine.outputs import claim_output, find_split, is_bare, is_up_to_date, score_source
from engine.pool import WorkerPool
from engine.scores.base import ImagePrediction
from engine.scores.evaluation import Evaluation
from engine.scores.records import protocol_id, short_name
from methods.base import crf_probs
from models.refiners.dense_crf import PRESETS, DenseCRF
from utils.cam_files import label_path
from utils.distributed import init_process_group, world_size
from utils.drawing import label_overlay, write_picture
from utils.image import UnreadableImageError, normalize, read_mask, write_mask
from utils.precision import autocast
from utils.worker import core_count


@dataclass(kw_only=True)
class Options(ImageOptions):
    """What the tool is told."""

    shares_work: ClassVar[bool] = True
    sections: ClassVar[tuple[str, ...]] = ("infer",)  # of the config that a pipeline passes on as it is now
    size: int | str | None = option(
        None,
        "native, or side of the square that images are resized to; default: infer.size",
        choices=("native",),
        least=1,
    )
    scales: list[float] = option([], "image scales; default: infer.scales")
    flip: bool | None = option(None, "add mirrored images; default: infer.flip")
    merge_flips: str | None = option(None, "default: infer.merge_flips", choices=MERGES)
    merge_scales: str | None = option(None, "default: infer.merge_scales", choices=MERGES)
    tags: bool | None = option(
        None,
        "rule out classes that an image is not tagged with, which makes pseudo labels and is no test of a "
        "network; default: infer.tags",
    )
    crf: str | None = option(
        None,
        "refine by DenseCRF; without a name the preset infer.crf, or else that of the method's paper; "
        "'none': no CRF",
        choices=("config", "none", *PRESETS),
        alone="config",
    )
    crf_workers: int | None = option(
        None,
        "processes that refine beside the network; default: one for each further core; on a GPU and for few "
        "images 0 (the main process refines)",
        free=True,
    )
    max_side: int = option(1024, "photos with a longer side are segmented at this size and enlarged", least=1)
    overlay: bool = option(False, "also write <out>/overlay/<name>.jpg (always for photos)")


def main(num_classes: int | None = None, other: str = "tools/infer_seg.py") -> None:
    """Entry point; a checkpoint of another number of classes than ``num_classes`` is sent to ``other``."""
    command_line(Options, partial(run, num_classes=num_classes, other=other), __doc__)


@torch.no_grad()
def run(options: Options, num_classes: int | None = None, other: str = "tools/infer_seg.py") -> Path:
    """Segment and score; returns the output folder."""
    device = init_process_group(options.device)
    loaded = load_method(options.model_path, device, options.changes())
    if num_classes is not None and len(loaded.class_names) != num_classes:
        raise ValueError(
            f"{options.model_path} has {len(loaded.class_names)} classes with background, this tool is for "
            f"{num_classes}: use {other}"
        )
    infer = _settings(options, loaded)
    split = find_split(loaded, options.infer)
    refine = DenseCRF.from_config(infer["crf"]) if infer["crf"] else None
    protocol = protocol_id(
        "seg",
        short_name(split),
        infer["scales"],
        infer["flip"],
        refine.protocol if refine else None,
        infer["tags"],
    )
    if infer["tags"] and not split.has_tags:
        raise ValueError(f"some images of {short_name(split)} have no known tags: infer without --tags")
    out, settings = claim_output(options, loaded, split, protocol, **infer)

    evaluation = Evaluation(split, loaded.cfg.eval.scores, device=device)
    overlay = options.overlay or (options.infer is not None and is_photo(options.infer))

    def add(record: Record, label: np.ndarray) -> None:
        evaluation.add(record, ImagePrediction({"seg": torch.from_numpy(label).to(device)}))

    def work(sample: Sample) -> None:
        record = split.records[int(sample["index"])]
        path, image_rgb = label_path(out, record.name), sample["image"]

        def finish(prediction: np.ndarray) -> None:
            if overlay:
                pixels = image_rgb.permute(1, 2, 0).numpy()
                write_picture(out / "overlay" / f"{record.name}.jpg", label_overlay(pixels, prediction))
            add(record, prediction)

        tags = sample["class_label"].to(device) if infer["tags"] else None
        arguments = loaded, image_rgb.to(device), infer
        if workers:
            image, scores = segment_scores(*arguments, options.precision, tags)
            arrays = image.cpu().numpy(), crf_probs(loaded.method, scores).cpu().numpy()
            pool.submit(refine_and_write, *arrays, refine, image_rgb.shape[-2:], path, then=finish)
        else:
            prediction = segment_image(*arguments, refine, options.precision, tags)
            write_mask(path, prediction)
            finish(prediction)

    bare = is_bare(split)
    workers = crf_workers(options.crf_workers, refine, device, len(split))
    with WorkerPool(workers) as pool:
        try:
            for_each_image(
                WeakSegDataset(split),
                work,
                text="segment",
                num_workers=options.num_workers,
                finished=lambda record: (
                    is_up_to_date(label_path(out, record.name), record, bare)
                    and (not overlay or (out / "overlay" / f"{record.name}.jpg").is_file())
                ),
                revisit=lambda record: add(record, read_mask(label_path(out, record.name))),
            )
        except UnreadableImageError:
            pool.drain()  # those that could be read
            raise
    source = score_source(options, loaded, split)
    evaluation.reduce().report(out, {"seg": protocol}, settings, source)
    return out


def segment_image(
    loaded: LoadedMethod,
    image_rgb: Tensor,
    infer: Mapping[str, Any],
    refine: DenseCRF | None,
    precision: str,
    class_label: Tensor | None = None,
) -> np.ndarray:
    """Label (H, W) uint8 of one (3, H, W) uint8 image by the ``infer`` section of a config.

    Args:
        refine: maps the image (1, 3, H, W) and probabilities (1, K, H, W) to better probabilities.
        class_label: (C,) true tags, to which the label is restricted.
    """
    image, scores = segment_scores(loaded, image_rgb, infer, precision, class_label)
    if refine is not None:
        scores = crf_probs(loaded.method, scores)
    return label_image(image, scores, refine, image_rgb.shape[-2:])


def segment_scores(
    loaded: LoadedMethod,
    image_rgb: Tensor,
    infer: Mapping[str, Any],
    precision: str,
    class_label: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The image (1, 3, h, w), with sides of at most ``max_side``, and its scores (1, K, h, w)."""
    height, width = image_rgb.shape[-2:]
    shrink = min(1.0, infer["max_side"] / max(height, width)) if infer["size"] == "native" else 1.0
    image = image_rgb[None]
    if shrink < 1:
        small = (max(1, round(height * shrink)), max(1, round(width * shrink)))
        image = F.interpolate(image.float(), small, mode="bilinear", antialias=True).round().to(torch.uint8)
    tags = None if class_label is None else class_label[None]
    with autocast(image.device, precision):
        keys = ("size", "scales", "flip", "merge_flips", "merge_scales", "resample", "pad_to")
        views = {key: infer[key] for key in keys if key in infer}
        scores = multi_scale_segment(loaded.method, normalize(image), **views, class_label=tags)
    return image, scores


def label_image(image: Tensor, scores: Tensor, refine: DenseCRF | None, size: Sequence[int]) -> np.ndarray:
    """Label of the given size, uint8, from an image (1, 3, h, w) and its scores (1, K, h, w).

    With ``refine`` the scores are the probabilities that it starts from.
    """
    if refine is not None:
        scores = refine.refine(image / 255, scores)
    label = scores.argmax(1).to(torch.uint8)
    if label.shape[1:] != tuple(size):
        label = F.interpolate(label[None], tuple(size), mode="nearest-exact")[0]
    return label[0].cpu().numpy()


def refine_and_write(
    image: np.ndarray, probs: np.ndarray, refine: DenseCRF, size: Sequence[int], path: Path
) -> np.ndarray:
    """`label_image` in a worker, which writes the label too, so that the network waits for neither.

    Arrays, because tensors travel between processes in shared memory, of which containers have little.
    """
    prediction = label_image(torch.from_numpy(image), torch.from_numpy(probs), refine, size)
    write_mask(path, prediction)
    return prediction


def crf_workers(asked: int | None, refine: DenseCRF | None, device: torch.device, images: int) -> int:
    """Number of processes that refine: starting them is not worth it for few images, and a GPU needs none."""
    if refine is None or device.type != "cpu":
        return 0
    if asked is not None:
        return asked
    return max(1, core_count() // world_size() - 1) if images >= 20 else 0


def _settings(options: Options, loaded: LoadedMethod) -> dict[str, Any]:
    """The ``infer`` section with what the command line says instead."""
    config = loaded.cfg.infer
    given = {key: value for key, value in vars(options).items() if value not in (None, [])}
    choose = lambda key: given.get(key, config.get(key))  # noqa: E731
    size = str(choose("size"))
    if size != "native" and not (size.isdigit() and int(size) > 0):
        raise ValueError(f"size is '{size}', not native or a number of pixels")
    # The config may name a preset or hold parameters; a plain --crf takes what is there, or the method's.
    named = options.crf not in (None, "config")
    own = loaded.method.crf_preset if options.crf else None
    crf = options.crf if named else to_plain(config).get("crf") or own
    return {
        "size": size if size == "native" else int(size),
        "scales": [float(scale) for scale in choose("scales")],
        "flip": bool(choose("flip")),
        "merge_flips": choose("merge_flips"),
        "merge_scales": choose("merge_scales"),
        "resample": config.resample,
        "pad_to": to_plain(config)["pad_to"],
        "tags": bool(choose("tags")),
        "crf": None if crf == "none" else crf,
        "max_side": options.max_side,
    }


if __name__ == "__main__":
    main()
