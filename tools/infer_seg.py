"""Segment images with a checkpoint: palette PNGs, and scores where there are masks.

    python tools/infer_seg.py --model_path logs/my_run/last.pth --infer val
    python tools/infer_seg.py --model_path logs/my_run/last.pth --infer photo.jpg --out out

The config comes out of the checkpoint; ``key=value`` changes it (data.root=..., data.options.masks=...). Run
again, it skips what is finished. Under torchrun (run_evaluate_seg_*.sh) the images are shared out over the
processes.
"""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from engine.config.common import ImageOptions
from engine.config.options import command_line, option
from models.refiners.presets import PRESETS


@dataclass(kw_only=True)
class Options(ImageOptions):
    """Options of the tool."""

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
    merge_flips: str | None = option(None, "default: infer.merge_flips", choices=("sum", "mean", "max"))
    merge_scales: str | None = option(None, "default: infer.merge_scales", choices=("sum", "mean", "max"))
    tags: bool | None = option(
        None,
        "rule out classes that an image is not tagged with, which makes pseudo labels and is no test of a "
        "network; default: infer.tags",
    )
    crf: str | None = option(
        None,
        "refine by DenseCRF with this preset; without a name by infer.refiner, or else with the preset of "
        "the method's paper; 'none': do not refine",
        choices=("config", "none", *PRESETS),
        alone="config",
    )
    crf_workers: int | None = option(
        None,
        "processes that refine beside the network; default: one for each further core; on a GPU and for few "
        "images 0 (the main process refines)",
        free=True,
    )
    tile: int | None = option(
        None, "larger images are segmented in overlapping tiles of this side; default: infer.tile", least=1
    )
    max_side: int = option(1024, "photos with a longer side are segmented at this size and enlarged", least=1)
    overlay: bool = option(False, "also write <out>/overlay/<name>.jpg (always for photos)")


def main(num_classes: int | None = None, other: str = "tools/infer_seg.py") -> None:
    """Entry point; a checkpoint of another number of classes than ``num_classes`` is sent to ``other``."""
    command_line(Options, partial(run, num_classes=num_classes, other=other), __doc__)


def run(options: Options, num_classes: int | None = None, other: str = "tools/infer_seg.py") -> Path:
    """Segment and score; returns the output folder."""
    from datasets.base import Record, Sample
    from engine.inference import is_photo
    from engine.outputs import Outputs, load_inputs
    from engine.pool import WorkerPool
    from engine.scores.records import protocol_id, short_name
    from engine.segmentation import (
        infer_section,
        inference_refiner,
        refining_processes,
        segment,
        segment_scores,
        write_label,
    )
    from utils.cam_files import label_path
    from utils.drawing import label_overlay, write_picture
    from utils.image import UnreadableImageError, read_mask, write_mask

    device, loaded, split = load_inputs(options)
    method, classes = loaded.method, len(loaded.class_names)
    if num_classes is not None and classes != num_classes:
        raise ValueError(
            f"{options.model_path} has {classes} classes with background, this tool is for {num_classes}: "
            f"use {other}"
        )
    keys = ("size", "scales", "flip", "merge_flips", "merge_scales", "tags", "tile")
    given = {key: value for key in keys if (value := getattr(options, key)) not in (None, [])}
    infer = infer_section(loaded, given, options.crf)
    refiner, refined = inference_refiner(infer.refiner, device)
    if infer.tags and not split.has_tags:
        raise ValueError(f"some images of {short_name(split)} have no known tags: infer without --tags")
    settings = {**asdict(infer), "max_side": options.max_side}
    protocol = protocol_id("seg", short_name(split), infer.scales, infer.flip, refined, infer.tags)
    outputs = Outputs.of_checkpoint(options, loaded, split, protocol, label_path, device, **settings)
    has_overlay = options.overlay or (options.infer is not None and is_photo(options.infer))
    workers = refining_processes(options.crf_workers, refiner, device, len(split))

    def overlay(record: Record) -> Path:
        return outputs.folder / "overlay" / f"{record.name}.jpg"

    def work(sample: Sample, record: Record) -> None:
        image_rgb = sample["image"]

        def finish(_: None) -> None:
            if has_overlay:
                pixels = image_rgb.cpu().permute(1, 2, 0).numpy()
                write_picture(overlay(record), label_overlay(pixels, read_mask(outputs.path(record))))
            outputs.finish(record)

        tags = sample["class_label"].to(device) if infer.tags else None
        own = None if refiner is None else refiner.of_image(record.name)

        precision, max_side = options.precision, options.max_side
        size, image_rgb = image_rgb.shape[-2:], image_rgb.to(device)
        if infer.tile and max(size) > infer.tile:
            label = segment(method, image_rgb, infer, own, precision, max_side, tags)
            pool.submit(write_mask, outputs.path(record), label.cpu().numpy(), then=finish)
            return
        made = segment_scores(method, image_rgb, infer, precision, max_side, tags)
        given = [tensor.cpu().numpy() for tensor in made] if workers else made
        pool.submit(write_label, *given, own, size, outputs.path(record), then=finish)

    with WorkerPool(workers) as pool:
        try:
            outputs.make(work, "segment", overlay if has_overlay else None)
        except UnreadableImageError:
            pool.drain()  # those that could be read
            raise
    return outputs.report()


if __name__ == "__main__":
    main()
