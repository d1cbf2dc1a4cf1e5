"""Labels out of a folder of CAMs by DenseCRF: seeds of affinity networks, or pseudo labels.

    python tools/crf.py --input logs/run/cam --recipe irn --out logs/run/seeds config=configs/irn/voc.yaml
    python tools/crf.py --input logs/run/cam --recipe psa --out logs/run/seeds --images photos

Every recipe has the published parameters. ``--values`` changes its thresholds or exponents. The images are a
split of the data set of a config or checkpoint, or a folder. Run again, it skips what is finished.

    toco     softmax over [threshold, CAMs], thresholds 0.7 0.25
    irn      labels of confidence 0.7 from CAM thresholds 0.30 0.05 (also CDA, WS-FCN)
    psa      [(1 - largest CAM)^alpha, CAMs], alphas 4 32;  seam  the same with 4 24
    clip_es  one run on [1 - largest CAM, CAMs]; pixels with a probability below 0.95 are ignored

``toco`` and ``irn`` run twice and write label images: what both runs call background is background, what only
the strict run does is ignored (255). One value runs once and ignores nothing. ``psa`` and ``seam`` write both
runs as scores (utils/cam_files.py, ``ScoreFile``), because training averages them over the cells of its grid.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from engine.config.common import DataOptions
from engine.config.options import command_line, option
from models.refiners.presets import PRESETS

# recipe: (DenseCRF preset, values of the strict and the lax run)
RECIPES: dict[str, tuple[str, tuple[float, ...]]] = {
    "toco": ("toco_pseudo_label", (0.7, 0.25)),
    "irn": ("irn", (0.30, 0.05)),
    "psa": ("psa", (4, 32)),
    "seam": ("seam", (4, 24)),
    "clip_es": ("clip_es", (0.95,)),
}
SCORES = ("psa", "seam")


@dataclass(kw_only=True)
class Options(DataOptions):
    """Options of the tool."""

    input: Path = option(meaning="folder of CAM files <name>.npz (tools/infer_cam.py)", reads=True)
    recipe: str = option(meaning="how CAMs become labels", choices=tuple(RECIPES))
    values: list[float] = option([], "thresholds or alphas of the recipe, the strict one first")
    images: Path | None = option(None, "folder of the images; default: those of the data set", reads=True)
    split: str | None = option(
        None, "split or list file (.txt) of the config; default: data.train_set", reads="images"
    )
    preset: str | None = option(
        None, "DenseCRF parameters; default: those of the recipe", choices=tuple(PRESETS)
    )
    steps: int = option(10, "mean-field steps")
    out: Path = option(meaning="folder for the label files <name>.png or <name>.npz")
    device: str = option("auto", "auto, cpu or cuda", free=True)
    processes: int | None = option(None, "worker processes on the CPU; default: one for each core", free=True)

    def __post_init__(self) -> None:
        most = RECIPES[self.recipe][1]
        self.values = self.values or list(most)
        is_alpha = self.recipe in SCORES
        known = (
            "two alphas above 0, the lower first" if is_alpha else "thresholds in (0, 1), the higher first"
        )
        in_range = all(0 < value < (math.inf if is_alpha else 1) for value in self.values)
        is_sorted = self.values == sorted(self.values, reverse=not is_alpha)
        if not (in_range and is_sorted and (2 if is_alpha else 1) <= len(self.values) <= len(most)):
            raise ValueError(f"values of recipe {self.recipe} must be {known}, got {self.values}")


def run(options: Options) -> Path:
    """Make every label that is not there yet; returns the output folder."""
    from engine.crf_labels import Job, find_images, run_job, write_label, write_scores
    from engine.data import data_config, load_split
    from engine.scores.records import short_name
    from models.refiners.dense_crf import DenseCRF
    from utils.cam_files import cam_path, label_path
    from utils.distributed import default_device
    from utils.files import claim_folder, origin_of, require_files

    device = default_device(options.device)
    crf = DenseCRF(options.preset or RECIPES[options.recipe][0], steps=options.steps)
    if options.images:
        images = find_images(options.input, options.images)
        source = {"images": str(options.images.absolute())}
    else:
        data = data_config(options).data
        split = load_split(data, options.split or data.train_set)
        require_files(
            (cam_path(options.input, record.name) for record in split.records),
            f"CAM files of split '{split.name}'",
            "finish tools/infer_cam.py on that split, or name another with --split",
        )
        images = {record.name: record for record in split.records}
        source = {"split": short_name(split), "data_fingerprint": split.fingerprint()}
    settings = {"recipe": options.recipe, "values": options.values, "crf": crf.protocol}
    claim_folder(options.out, {"input": origin_of(options.input), **source, **settings})
    job = Job(options.input, options.out, options.recipe, tuple(options.values), crf, device)
    path_of, work = (cam_path, write_scores) if options.recipe in SCORES else (label_path, write_label)
    run_job(job, work, path_of, images, options.processes)
    return options.out


if __name__ == "__main__":
    command_line(Options, run, __doc__)
