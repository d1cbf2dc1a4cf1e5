"""Pseudo labels: a random walk of CAMs over the affinities of a trained network, scored where masks are.

    python tools/propagate_cam.py --model_path logs/run/irn_net/last.pth --cam logs/run/cam --infer train

The checkpoint says which walk (IRN, PSA, SEAM) and its constants; ``method.beta=8`` changes one. An image
without classes becomes background. Run again, it skips what is finished.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


from engine.config.common import ImageOptions
from engine.config.options import command_line, option


@dataclass(kw_only=True)
class Options(ImageOptions):
    """What to read, and how."""

    shares_work: ClassVar[bool] = True
    cam: Path = option(meaning="folder of CAM files <name>.npz (tools/infer_cam.py)", reads=True)
    crf_steps: int = option(
        0, "mean-field steps of PSA's DenseCRF on the walked scores (SEAM: 1; default 0, none)"
    )


def run(options: Options) -> Path:
    """Write and score pseudo labels; returns the output folder."""
    import numpy as np
    import torch

    from datasets.base import Record, Sample, WeakSegDataset
    from engine.crf_labels import named
    from engine.inference import for_each_image, load_method
    from engine.outputs import claim_output, find_split, score_source
    from engine.scores.base import ImagePrediction
    from engine.scores.evaluation import Evaluation
    from engine.scores.records import short_name
    from methods.base import Propagates
    from models.refiners.dense_crf import DenseCRF
    from utils.cam_files import cam_path, label_path, load_cam
    from utils.distributed import init_process_group
    from utils.files import origin_of, require_files
    from utils.image import normalize, read_mask, write_mask
    from utils.precision import autocast

    device = init_process_group(options.device)
    loaded = load_method(options.model_path, device, options.changes())
    method = loaded.method
    if not isinstance(method, Propagates):
        raise ValueError(f"{type(method).__name__} does not propagate CAMs")
    split = find_split(loaded, options.infer)
    cam_folder = options.cam
    require_files(
        (cam_path(cam_folder, record.name) for record in split.records),
        f"CAM files of {short_name(split)}",
        "finish tools/infer_cam.py on the same images",
    )
    crf = DenseCRF("psa", steps=options.crf_steps) if options.crf_steps else None
    protocol = f"pseudo/{short_name(split)}/walk" + (f"+{crf.protocol}" if crf else "")
    out, settings = claim_output(options, loaded, split, protocol, cam=origin_of(cam_folder))
    evaluation = Evaluation(split, loaded.cfg.eval.scores, device=device)

    def work(sample: Sample) -> None:
        record, image_rgb = split.records[int(sample["index"])], sample["image"]
        label = pseudo_label(record, image_rgb)
        write_mask(label_path(out, record.name), label)
        add(record, label)

    def add(record: Record, label: np.ndarray) -> None:
        evaluation.add(record, ImagePrediction({"seg": torch.from_numpy(label).to(device)}))

    def pseudo_label(record: Record, image_rgb: torch.Tensor) -> np.ndarray:
        cams = load_cam(cam_path(cam_folder, record.name))
        if not len(cams.class_ids):
            return np.zeros(image_rgb.shape[1:], np.uint8)
        is_strided = method.walk_stride > 1 and cams.strided is not None
        cam = (cams.strided if is_strided else cams.cam).to(device)
        with autocast(device, options.precision):
            scores = method.propagate(normalize(image_rgb.to(device))[None], cam)
        if crf is not None:
            scores = crf.refine(image_rgb[None].to(device) / 255, scores[None])[0]
        return named(scores.argmax(0), cams.label_ids)

    for_each_image(
        WeakSegDataset(split),
        work,
        text="walk",
        num_workers=options.num_workers,
        finished=lambda record: label_path(out, record.name).is_file(),
        revisit=lambda record: add(record, read_mask(label_path(out, record.name))),
    )
    source = score_source(options, loaded, split)
    evaluation.reduce().report(out, {"seg": protocol}, settings, source)
    return out


if __name__ == "__main__":
    command_line(Options, run, __doc__)
