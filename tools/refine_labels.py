"""Refine label images or CAM files by any refiner, and score them where there are masks (docs/refiners.md).

    python tools/refine_labels.py --input labels --refiner mask_vote --masks sam --images photos --out voted
    python tools/refine_labels.py --input cam --refiner "{name: pamr, iterations: 5}" --images photos --out x

CAMs become labels beside a background of ``--threshold``, or with ``--write cam`` CAMs again. Run again, it
skips what is finished.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from engine.config.common import DataOptions
from engine.config.options import command_line, option


@dataclass(kw_only=True)
class Options(DataOptions):
    shares_work: ClassVar[bool] = True
    input: Path = option(meaning="folder of label images <name>.png or CAM files <name>.npz", reads=True)
    refiner: str | dict[str, Any] = option(meaning="name of a refiner, or a mapping of name and options")
    out: Path = option(meaning="folder for the refined labels")
    images: Path | None = option(None, "folder of the images; default: those of the data set", reads=True)
    split: str | None = option(None, "split or list file; default: data.train_set", reads="images")
    masks: Path | None = option(None, "folder of masks for mask_vote; default: superpixels", reads=True)
    write: str = option("labels", "of CAM files: labels, or refined CAMs", choices=("labels", "cam"))
    threshold: float | None = option(None, "beside CAMs; default: method.background_threshold, else 0.5")
    tags: bool = option(False, "ignore (255) pixels of classes that an image is not tagged with")
    device: str = option("auto", "auto, cpu or cuda", free=True)
    num_workers: int = option(2, "processes that decode images", free=True)


def run(options: Options) -> Path:
    """Refine and score; returns the output folder."""
    import torch
    import yaml

    from datasets.base import Record, Sample
    from engine import refinement
    from engine.data import data_config, load_split
    from engine.inference import image_split
    from engine.outputs import Outputs
    from engine.scores.evaluation import Evaluation
    from engine.scores.records import provenance, short_name
    from engine.segmentation import inference_refiner
    from utils.cam_files import cam_path, label_path, load_cam, save_cam
    from utils.distributed import init_process_group
    from utils.files import origin_of
    from utils.image import IGNORE_INDEX, write_mask

    device = init_process_group(options.device)
    config = yaml.safe_load(options.refiner) if isinstance(options.refiner, str) else options.refiner
    if options.masks:
        config = {**({"name": config} if isinstance(config, str) else config), "masks": str(options.masks)}
    refiner, refined = inference_refiner(config, device, key="refiner")
    assert refiner is not None

    if options.images:
        cfg, scores = {}, ()
        split = image_split(options.images, [f"class_{k}" for k in range(IGNORE_INDEX)])
    else:
        cfg = data_config(options)
        split, scores = load_split(cfg.data, options.split or cfg.data.train_set), cfg.eval.scores
    if options.tags and not split.has_tags:
        raise ValueError(f"some images of {short_name(split)} have no known tags: refine without tags")
    is_cam, to_cam = cam_path(options.input, split.records[0].name).is_file(), options.write == "cam"
    if to_cam and not is_cam:
        raise ValueError(f"{options.input} has no CAMs of these images")

    path_of = cam_path if is_cam else label_path

    def source_of(record: Record) -> Path:
        return path_of(options.input, record.name)

    split.require(options.input, path_of, "the stage that makes them")
    threshold = cfg.get("method", {}).get("background_threshold", 0.5)
    threshold = float(threshold if options.threshold is None else options.threshold)

    origin = origin_of(options.input)
    before = origin.get("protocol", "").split("/")[2:]
    steps = [*before, *(["tags"] if options.tags else []), refined]
    settings = {"input": origin, "refiner": config, "tags": options.tags, "write": options.write}
    settings |= {"threshold": threshold} if is_cam and not to_cam else {}
    outputs = Outputs(
        options.out,
        split,
        f"{'cam' if to_cam else 'pseudo'}/{short_name(split)}/{'+'.join(steps)}",
        cam_path if to_cam else label_path,
        Evaluation(split, scores, threshold, device),
        settings=settings,
        source=provenance(cfg, split),
        num_workers=options.num_workers,
        reads=source_of,
        ignored="background",
    )

    def work(sample: Sample, record: Record) -> None:
        image_rgb, own = sample["image"].to(device) / 255, refiner.of_image(record.name)
        tags = sample["class_label"].to(device) if options.tags else None
        if is_cam:
            cams = refinement.tagged_cams(load_cam(source_of(record)), tags)
        if to_cam:
            save_cam(outputs.path(record), refinement.refine_cam(own, image_rgb, cams))
        elif is_cam:
            write_mask(outputs.path(record), refinement.cam_to_refined_label(own, image_rgb, cams, threshold))
        else:
            label = refinement.tagged_label(refinement.read_label(source_of(record), image_rgb), tags)
            write_mask(outputs.path(record), refinement.refine_label(own, image_rgb, label))
        outputs.finish(record)

    with torch.no_grad():
        outputs.make(work, "refine")
    return outputs.report()


if __name__ == "__main__":
    command_line(Options, run, __doc__)
