"""Refine a folder of label images or CAM files by any refiner, and score it where there are masks.

    python tools/refine_labels.py --input labels --refiner mask_vote --masks sam --images photos --out voted
    python tools/refine_labels.py --input cam --refiner "{name: pamr, iterations: 5}" --images photos --out x

The images are a split of the data set of a config or checkpoint, or a folder. CAMs become labels beside a
background of ``--threshold``, or with ``--write cam`` CAMs again. Run again, it skips what is finished
(docs/refiners.md).
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from engine.config.common import DataOptions
from engine.config.options import command_line, option


@dataclass(kw_only=True)
class Options(DataOptions):
    """Options of the tool."""

    shares_work: ClassVar[bool] = True
    input: Path = option(meaning="folder of label images <name>.png or CAM files <name>.npz", reads=True)
    refiner: str | dict[str, Any] = option(meaning="name of a refiner, or a mapping of name and options")
    out: Path = option(meaning="folder for the refined labels")
    images: Path | None = option(None, "folder of the images; default: those of the data set", reads=True)
    split: str | None = option(None, "split or list file; default: data.train_set", reads="images")
    masks: Path | None = option(None, "folder of masks for mask_vote; default: superpixels", reads=True)
    write: str = option("labels", "of CAM files: labels, or refined CAMs", choices=("labels", "cam"))
    threshold: float | None = option(
        None, "background score beside CAMs; default: method.background_threshold, else 0.5"
    )
    tags: bool = option(False, "ignore (255) pixels of classes that an image is not tagged with")
    device: str = option("auto", "auto, cpu or cuda", free=True)
    num_workers: int = option(2, "processes that decode images", free=True)


def run(options: Options) -> Path:
    """Refine and score; returns the output folder."""
    import torch
    import yaml

    from datasets.base import Record, Sample, WeakSegDataset
    from engine.data import data_config, load_split
    from engine.inference import for_each_image, image_split
    from engine.refinement import cam_to_refined_label, only_tagged, refine_cam, refine_label
    from engine.scores.base import predicted_file
    from engine.scores.evaluation import Evaluation
    from engine.scores.records import provenance, short_name
    from engine.segmentation import inference_refiner
    from utils.cam_files import CamFile, cam_path, label_path, load_cam, save_cam
    from utils.distributed import barrier, init_process_group, is_main
    from utils.files import claim_folder, origin_of, require_files
    from utils.image import IGNORE_INDEX, read_mask, write_mask

    device = init_process_group(options.device)
    config = yaml.safe_load(options.refiner) if isinstance(options.refiner, str) else options.refiner
    if options.masks:
        config = {**({"name": config} if isinstance(config, str) else config), "masks": str(options.masks)}
    refiner, refined = inference_refiner(config, device, key="refiner")
    assert refiner is not None

    cfg = None if options.images else data_config(options)
    if cfg is None:
        assert options.images is not None
        split = image_split(options.images, [f"class_{k}" for k in range(IGNORE_INDEX)])
    else:
        split = load_split(cfg.data, options.split or cfg.data.train_set)
    if options.tags and not split.has_tags:
        raise ValueError(f"some images of {short_name(split)} have no known tags: refine without tags")
    is_cam, to_cam = cam_path(options.input, split.records[0].name).is_file(), options.write == "cam"
    if to_cam and not is_cam:
        raise ValueError(f"{options.input} has no CAMs of these images")
    source_of, result_of = (cam_path if is_cam else label_path), (cam_path if to_cam else label_path)
    require_files(
        (source_of(options.input, record.name) for record in split.records),
        f"labels or CAM files of split '{split.name}'",
        "finish the stage that makes them, or name other images with --split",
    )
    threshold = (cfg or {}).get("method", {}).get("background_threshold", 0.5)
    threshold = float(threshold if options.threshold is None else options.threshold)

    origin = origin_of(options.input)
    before = origin.get("protocol", "").split("/")[2:]
    steps = [*before, *(["tags"] if options.tags else []), refined]
    protocol = f"{'cam' if to_cam else 'pseudo'}/{short_name(split)}/{'+'.join(steps)}"
    settings = {"protocol": protocol, "input": origin, "refiner": config, "tags": options.tags}
    settings |= {"write": options.write} | ({"threshold": threshold} if is_cam and not to_cam else {})
    if is_main():
        claim_folder(options.out, settings)
        print(f"output   {options.out}   ({len(split)} images, protocol {protocol})")
    barrier()
    scores = () if cfg is None else cfg.eval.scores
    evaluation = Evaluation(split, scores, threshold, device)

    def work(sample: Sample) -> None:
        record, image_rgb = split.records[int(sample["index"])], sample["image"].to(device) / 255
        own, source = refiner.of_image(record.name), source_of(options.input, record.name)
        if is_cam:
            cams = load_cam(source)
            if options.tags:
                kept = torch.isin(cams.class_ids, sample["class_label"].nonzero()[:, 0] + 1)
                cams = CamFile(cams.class_ids[kept], cams.cam[kept], None, cams.size)
            if to_cam:
                save_cam(cam_path(options.out, record.name), refine_cam(own, image_rgb, cams))
                return add(record)
            label = cam_to_refined_label(own, image_rgb, cams, threshold)
        else:
            label = torch.from_numpy(read_mask(source)).to(device).long()
            if label.shape != image_rgb.shape[1:]:
                raise ValueError(f"{source} is {tuple(label.shape)}, its image {tuple(image_rgb.shape[1:])}")
            label = only_tagged(label, sample["class_label"].to(device)) if options.tags else label
            label = refine_label(own, image_rgb, label)
        write_mask(label_path(options.out, record.name), label.to(torch.uint8))
        return add(record)

    def add(record: Record) -> None:
        prediction = predicted_file(result_of(options.out, record.name), threshold, device)
        evaluation.add(record, prediction, "background")

    with torch.no_grad():
        for_each_image(
            WeakSegDataset(split),
            work,
            text="refine",
            num_workers=options.num_workers,
            finished=lambda record: result_of(options.out, record.name).is_file(),
            revisit=add,
        )
    evaluation.reduce().report(options.out, protocol, settings, provenance(cfg, split))
    return options.out


if __name__ == "__main__":
    command_line(Options, run, __doc__)
