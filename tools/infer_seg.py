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
from typing import Any, ClassVar

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


from engine.config.common import ImageOptions
from engine.config.options import command_line, fill, option
from engine.config.schema import Infer
from models.refiners.presets import PRESETS


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
    max_side: int = option(1024, "photos with a longer side are segmented at this size and enlarged", least=1)
    overlay: bool = option(False, "also write <out>/overlay/<name>.jpg (always for photos)")


def main(num_classes: int | None = None, other: str = "tools/infer_seg.py") -> None:
    """Entry point; a checkpoint of another number of classes than ``num_classes`` is sent to ``other``."""
    command_line(Options, partial(run, num_classes=num_classes, other=other), __doc__)


def run(options: Options, num_classes: int | None = None, other: str = "tools/infer_seg.py") -> Path:
    """Segment and score; returns the output folder."""
    import numpy as np
    import torch

    from datasets.base import Record, Sample, WeakSegDataset
    from engine.inference import (
        for_each_image,
        is_photo,
        load_method,
    )
    from engine.outputs import claim_output, date_after, find_split, is_bare, is_up_to_date, score_source
    from engine.pool import WorkerPool
    from engine.scores.base import ImagePrediction
    from engine.scores.evaluation import Evaluation
    from engine.scores.records import protocol_id, short_name
    from engine.segmentation import (
        inference_refiner,
        refine_and_write,
        refining_processes,
        segment_image,
        segment_scores,
    )
    from methods.base import crf_probs
    from utils.cam_files import label_path
    from utils.distributed import init_process_group
    from utils.drawing import label_overlay, write_picture
    from utils.image import UnreadableImageError, read_mask, write_mask

    device = init_process_group(options.device)
    loaded = load_method(options.model_path, device, options.changes())
    if num_classes is not None and len(loaded.class_names) != num_classes:
        raise ValueError(
            f"{options.model_path} has {len(loaded.class_names)} classes with background, this tool is for "
            f"{num_classes}: use {other}"
        )
    infer = _settings(options, loaded)
    split = find_split(loaded, options.infer)
    refiner, refined = inference_refiner(infer.refiner, device)
    protocol = protocol_id("seg", short_name(split), infer.scales, infer.flip, refined, infer.tags)
    if infer.tags and not split.has_tags:
        raise ValueError(f"some images of {short_name(split)} have no known tags: infer without --tags")
    out, settings = claim_output(options, loaded, split, protocol, **asdict(infer), max_side=options.max_side)

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
            date_after(path, record, bare)
            add(record, prediction)

        tags = sample["class_label"].to(device) if infer.tags else None
        arguments = loaded.method, image_rgb.to(device), infer
        own = None if refiner is None else refiner.of_image(record.name)
        if workers:
            image, scores = segment_scores(*arguments, options.precision, options.max_side, tags)
            arrays = image.cpu().numpy(), crf_probs(loaded.method, scores).cpu().numpy()
            pool.submit(refine_and_write, *arrays, own, image_rgb.shape[-2:], path, then=finish)
        else:
            prediction = segment_image(
                *arguments,
                own,
                precision=options.precision,
                max_side=options.max_side,
                class_label=tags,
            )
            write_mask(path, prediction)
            finish(prediction)

    bare = is_bare(split)
    workers = refining_processes(options.crf_workers, refiner, device, len(split))
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


def _settings(options: Options, loaded: Any) -> Infer:
    """The ``infer`` section with what the command line says instead."""
    from engine.config.load import to_plain

    config = to_plain(loaded.cfg.infer)
    keys = ("size", "scales", "flip", "merge_flips", "merge_scales", "tags")
    given = {key: value for key in keys if (value := getattr(options, key)) not in (None, [])}
    if options.crf == "none":
        given["refiner"] = None
    elif options.crf == "config":
        preset = loaded.method.crf_preset
        given["refiner"] = config["refiner"] or {"name": "dense_crf", "preset": preset}
    elif options.crf:
        given["refiner"] = {"name": "dense_crf", "preset": options.crf}
    return fill(Infer, config | given, "infer")


if __name__ == "__main__":
    main()
