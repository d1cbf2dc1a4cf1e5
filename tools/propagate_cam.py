"""Pseudo labels: a random walk of CAMs over the affinities of a trained network, scored where masks are.

    python tools/propagate_cam.py --model_path logs/run/irn_net/last.pth --cam logs/run/cam --infer train

The checkpoint says which walk (IRN, PSA, SEAM) and its constants; ``method.beta=8`` changes one. An image
without classes becomes background. Run again, it skips what is finished.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from engine.config.common import ImageOptions
from engine.config.options import command_line, option


@dataclass(kw_only=True)
class Options(ImageOptions):
    shares_work: ClassVar[bool] = True
    cam: Path = option(meaning="folder of CAM files <name>.npz (tools/infer_cam.py)", reads=True)
    crf_steps: int = option(0, "mean-field steps of PSA's DenseCRF on the walked scores (SEAM: 1)")


def run(options: Options) -> Path:
    """Write and score pseudo labels; returns the output folder."""
    import numpy as np

    from datasets.base import Record, Sample
    from engine.crf_labels import named
    from engine.outputs import Outputs, load_inputs
    from engine.scores.records import short_name
    from methods.base import Propagates
    from models.refiners.dense_crf import DenseCRF
    from utils.cam_files import cam_path, label_path, load_cam
    from utils.files import origin_of
    from utils.image import normalize, write_mask
    from utils.precision import autocast

    device, loaded, split = load_inputs(options)
    method = loaded.method
    if not isinstance(method, Propagates):
        raise ValueError(f"{type(method).__name__} does not propagate CAMs")

    def source_of(record: Record) -> Path:
        return cam_path(options.cam, record.name)

    split.require(options.cam, cam_path, "tools/infer_cam.py")
    crf = DenseCRF("psa", steps=options.crf_steps) if options.crf_steps else None
    protocol = f"pseudo/{short_name(split)}/walk" + (f"+{crf.protocol}" if crf else "")
    outputs = Outputs.of_checkpoint(
        options, loaded, split, protocol, label_path, device, source_of, cam=origin_of(options.cam)
    )

    def work(sample: Sample, record: Record) -> None:
        cams, image_rgb = load_cam(source_of(record)), sample["image"].to(device)
        if len(cams.class_ids):
            cam = cams.cam if method.walk_stride == 1 or cams.strided is None else cams.strided
            with autocast(device, options.precision):
                scores = method.propagate(normalize(image_rgb)[None], cam.to(device))
            if crf is not None:
                scores = crf.refine(image_rgb[None] / 255, scores[None])[0]
            label = named(scores.argmax(0), cams.label_ids)
        else:
            label = np.zeros(image_rgb.shape[1:], np.uint8)
        write_mask(outputs.path(record), label)
        outputs.finish(record)

    outputs.make(work, "walk")
    return outputs.report()


if __name__ == "__main__":
    command_line(Options, run, __doc__)
