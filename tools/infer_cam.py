"""Class activation maps of a checkpoint: one .npz file per image, scored over thresholds where there are
masks.

    python tools/infer_cam.py --model_path logs/my_run/last.pth --infer train --out logs/my_run/cam

A file holds the CAMs of the classes that its image is tagged with (``utils/cam_files.py`` reads it back);
images whose tags are unknown get those that the classifier finds. Run again, it skips what is finished.
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
    """What the tool is told."""

    shares_work: ClassVar[bool] = True
    size: int | str | None = option(
        None,
        "native, or side of the square that images are resized to; default: eval.size",
        choices=("native",),
        least=1,
    )
    scales: list[float] = option([], "image scales (1 is always used); default: method.cam_scales")
    stride: int = option(1, "store one value per stride x stride pixels", least=1)
    dtype: str = option("float16", "of the stored values", choices=("float16", "float32"))


def run(options: Options) -> Path:
    """Write and score CAMs; returns the output folder."""
    import torch

    from datasets.base import Record, Sample, WeakSegDataset
    from engine.inference import for_each_image, load_method
    from engine.outputs import claim_output, date_after, find_split, is_bare, is_up_to_date, score_source
    from engine.scores.base import predicted_cams
    from engine.scores.evaluation import Evaluation
    from engine.scores.records import protocol_id, short_name
    from methods.base import Predicts
    from utils.cam_files import CamFile, cam_path, load_cam, save_cam
    from utils.distributed import init_process_group
    from utils.image import normalize, resize, strided_size
    from utils.precision import autocast

    device = init_process_group(options.device)
    loaded = load_method(options.model_path, device, options.changes())
    method = loaded.method
    if not isinstance(method, Predicts):
        raise ValueError(f"{type(method).__name__} makes no CAM")
    split = find_split(loaded, options.infer)
    scales = [float(s) for s in options.scales or method.cam_scales]
    size = options.size or loaded.cfg.eval.size
    protocol = protocol_id("cam", short_name(split), scales)
    out, settings = claim_output(
        options,
        loaded,
        split,
        protocol,
        size=size,
        scales=scales,
        stride=options.stride,
        dtype=options.dtype,
    )
    evaluation = Evaluation(split, loaded.cfg.eval.scores, method.background_threshold, device)

    def work(sample: Sample) -> None:
        record = split.records[int(sample["index"])]
        image = normalize(sample["image"].to(device))[None]
        height, width = image.shape[-2:]
        if size != "native":
            image = resize(image, (size, size))
        with autocast(device, options.precision):
            made = method.predict(image, scales)
        found = method.present(made.class_logits[0]).nonzero()[:, 0].add(1).tolist()
        tags = torch.tensor(found if record.tags is None else record.tags, dtype=torch.int64)
        stored = (max(1, height // options.stride), max(1, width // options.stride))
        cam, aux_cam, strided = (
            None if m is None else resize(m[:, (tags - 1).to(m.device)].float(), target)[0]
            for m, target in (
                (made.cam, stored),
                (made.aux_cam, stored),
                (made.strided_cam, strided_size((height, width), 4)),
            )
        )
        if cam is None:
            raise ValueError(f"{type(method).__name__} makes no CAM")
        cams = CamFile(tags, cam, aux_cam, (height, width), strided)
        save_cam(cam_path(out, record.name), cams, options.dtype)
        date_after(cam_path(out, record.name), record, bare)
        add(record)

    def add(record: Record) -> None:
        cams = load_cam(cam_path(out, record.name))
        evaluation.add(record, predicted_cams(cams, method.background_threshold, device))

    bare = is_bare(split)
    for_each_image(
        WeakSegDataset(split),
        work,
        text="cam",
        num_workers=options.num_workers,
        finished=lambda record: is_up_to_date(cam_path(out, record.name), record, bare),
        revisit=add,
    )
    source = score_source(options, loaded, split)
    protocols = {name: protocol.replace("cam/", f"{name}/", 1) for name in ("cam", "aux_cam")}
    evaluation.reduce().report(out, protocols, settings, source)
    return out


if __name__ == "__main__":
    command_line(Options, run, __doc__)
