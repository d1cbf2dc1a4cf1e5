"""Class activation maps of a checkpoint: an .npz file per image, scored where there are masks.

    python tools/infer_cam.py --model_path logs/my_run/last.pth --infer train --out logs/my_run/cam

A file holds the CAMs of the tags of its image, or, if they are unknown, of the classes that the classifier
finds (``utils/cam_files.py`` reads it back). Run again, it skips what is finished.
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
    size: int | str | None = option(
        None, "or side of a square; default: eval.size", choices=("native",), least=1
    )
    scales: list[float] = option([], "image scales (1 is always used); default: method.cam_scales")
    dtype: str = option("float16", "of the stored values", choices=("float16", "float32"))


def run(options: Options) -> Path:
    """Write and score CAMs; returns the output folder."""
    import torch

    from datasets.base import Record, Sample
    from engine.outputs import Outputs, load_inputs
    from engine.scores.records import protocol_id, short_name
    from methods.base import Predicts, PredictsTagged
    from utils.cam_files import CamFile, cam_path, save_cam
    from utils.image import normalize, resize, strided_size
    from utils.precision import autocast

    device, loaded, split = load_inputs(options)
    method = loaded.method
    if not isinstance(method, Predicts):
        raise ValueError(f"{type(method).__name__} makes no CAM")
    scales = [float(s) for s in options.scales or method.cam_scales]
    size = options.size or loaded.cfg.eval.size
    settings = {"size": size, "scales": scales, "dtype": options.dtype}
    protocol = protocol_id("cam", short_name(split), scales)
    outputs = Outputs.of_checkpoint(options, loaded, split, protocol, cam_path, device, **settings)

    def work(sample: Sample, record: Record) -> None:
        image = normalize(sample["image"].to(device))[None]
        native = (image.shape[-2], image.shape[-1])
        if size != "native":
            image = resize(image, (size, size))
        with autocast(device, options.precision):
            if isinstance(method, PredictsTagged) and record.tags is not None:
                made = method.predict_tagged(image, sample["class_label"][None].to(device), scales)
            else:
                made = method.predict(image, scales)
        if made.cam is None:
            raise ValueError(f"{type(method).__name__} makes no CAM")
        found = method.present(made.class_logits[0]).nonzero()[:, 0].add(1).tolist()
        tags = torch.tensor(found if record.tags is None else record.tags, dtype=torch.int64)
        cam, aux_cam, strided = (
            None if m is None else resize(m[:, (tags - 1).to(m.device)].float(), target)[0]
            for m, target in (
                (made.cam, native),
                (made.aux_cam, native),
                (made.strided_cam, strided_size(native, 4)),
            )
        )
        save_cam(outputs.path(record), CamFile(tags, cam, aux_cam, native, strided), options.dtype)
        outputs.finish(record)

    outputs.make(work, "cam")
    return outputs.report()


if __name__ == "__main__":
    command_line(Options, run, __doc__)
