"""Segment images with a checkpoint: palette PNGs, and scores where there are masks.

    python tools/infer_seg.py --model_path logs/my_run/last.pth --infer val
    python tools/infer_seg.py --model_path logs/my_run/last.pth --infer photo.jpg --out out

``key=value`` changes the checkpoint's config (keys: scripts/train_voc.py --help). Run again, it skips what is
finished. Under torchrun (run_evaluate_seg_*.sh) processes share the images.
"""

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
    shares_work: ClassVar[bool] = True
    sections: ClassVar[tuple[str, ...]] = ("infer",)  # of the config that a pipeline passes on as it is now
    crf: str | None = option(
        None,
        "refine by DenseCRF with this preset; without a name by infer.refiner, or else with the preset of "
        "the method's paper; 'none': do not refine",
        choices=("config", "none", *PRESETS),
        alone="config",
    )
    crf_workers: int | None = option(None, "processes that refine; default: by images and cores", free=True)
    max_side: int = option(1024, "photos with a longer side are segmented at this size and enlarged", least=1)


def main(num_classes: int | None = None, other: str = "tools/infer_seg.py") -> None:
    """Entry point; a checkpoint of another number of classes than ``num_classes`` is sent to ``other``."""
    command_line(Options, partial(run, num_classes=num_classes, other=other), __doc__)


def run(options: Options, num_classes: int | None = None, other: str = "tools/infer_seg.py") -> Path:
    """Segment and score; returns the output folder."""
    from datasets.base import Record, Sample
    from engine.outputs import Outputs, load_inputs
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
    from utils.image import UnreadableImageError, write_mask
    from utils.pool import WorkerPool

    device, loaded, split = load_inputs(options)
    method, classes = loaded.method, len(loaded.class_names)
    if num_classes is not None and classes != num_classes:
        raise ValueError(f"the checkpoint has {classes} classes, this tool is for {num_classes}: use {other}")
    infer = infer_section(loaded, options.crf)
    refiner, refined = inference_refiner(infer.refiner, device)
    if infer.tags and not split.has_tags:
        raise ValueError(f"some images of {short_name(split)} have no known tags: set infer.tags=false")
    settings = {**asdict(infer), "max_side": options.max_side}
    protocol = protocol_id("seg", short_name(split), infer.scales, infer.flip, refined, infer.tags)
    outputs = Outputs.of_checkpoint(options, loaded, split, protocol, label_path, device, **settings)
    workers = refining_processes(options.crf_workers, refiner, device, len(split))

    def work(sample: Sample, record: Record) -> None:
        finish = partial(outputs.finish, record)
        tags = sample["class_label"].to(device) if infer.tags else None
        own = None if refiner is None else refiner.of_image(record.name)
        precision, max_side = options.precision, options.max_side
        size, image_rgb = sample["image"].shape[-2:], sample["image"].to(device)
        if infer.tile and max(size) > infer.tile:
            label = segment(method, image_rgb, infer, own, precision, max_side, tags)
            pool.submit(write_mask, outputs.path(record), label.cpu().numpy(), then=finish)
            return
        made = segment_scores(method, image_rgb, infer, precision, max_side, tags)
        given = [tensor.cpu().numpy() for tensor in made] if workers else made
        pool.submit(write_label, *given, own, size, outputs.path(record), then=finish)

    with WorkerPool(workers) as pool:
        try:
            outputs.make(work, "segment")
        except UnreadableImageError:
            pool.drain()  # those that could be read
            raise
    return outputs.report()


if __name__ == "__main__":
    main()
