"""Refine a folder of CAMs or probabilities by DenseCRF to label images (docs/crf.md has the recipes).

    python tools/crf.py --input logs/run/cam --images photos --recipe irn --out logs/run/seeds
    python tools/crf.py --input probs --images photos --recipe probs --preset toco --out labels

``--input`` holds CAM files of tools/infer_cam.py, or files <name>.npz with ``probs`` (K, h, w) and, if
channel k is not class k, ``class_ids`` (K,). Run again, it skips what is finished.
"""

import math
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from engine.config.options import command_line, option
from models.refiners.presets import PRESETS

# recipe: (DenseCRF preset, values of the strict and the lax run)
RECIPES: dict[str, tuple[str, tuple[float, ...]]] = {
    "toco": ("toco_pseudo_label", (0.7, 0.25)),
    "irn": ("irn", (0.30, 0.05)),
    "psa": ("psa", (4, 32)),
    "seam": ("seam", (4, 24)),
    "clip_es": ("clip_es", (0.95,)),
    "probs": ("toco", ()),
}


@dataclass(kw_only=True)
class Options:
    input: Path = option(meaning="folder of .npz files, also in subfolders", reads=True)
    images: Path = option(meaning="folder of the images, <name>.jpg (or another image format)", reads=True)
    out: Path = option(meaning="folder for the label images <name>.png")
    recipe: str = option(meaning="how maps become probabilities of labels", choices=tuple(RECIPES))
    values: list[float] = option([], "thresholds or alphas of the recipe: two (strict, lax) or one")
    preset: str | None = option(None, "DenseCRF parameters; default: the recipe's", choices=tuple(PRESETS))
    steps: int = option(10, "mean-field steps")
    device: str = option("auto", "auto, cpu or cuda", free=True)
    processes: int | None = option(None, "worker processes on the CPU; default: one for each core", free=True)

    def __post_init__(self) -> None:
        self.values = self.values or list(RECIPES[self.recipe][1])
        count, allowed = {"probs": ("no", (0,)), "clip_es": ("one", (1,))}.get(
            self.recipe, ("one or two", (1, 2))
        )
        # The strict run has the higher threshold, or the lower alpha.
        falling = self.recipe in ("toco", "irn", "clip_es")
        in_range = all(0 < value < (1 if falling else math.inf) for value in self.values)
        in_order = len(self.values) < 2 or (self.values[0] > self.values[1]) == falling
        if len(self.values) not in allowed or not in_range or not in_order:
            limits = "thresholds in (0, 1), higher first" if falling else "alphas above 0, lower first"
            raise ValueError(f"recipe {self.recipe} takes {count} values, {limits}, got {self.values}")


def run(options: Options) -> Path:
    """Refine every file that has no label image yet; returns the output folder."""
    from engine.crf_labels import Job, find_images, run_job, write_label, write_label_of_probs
    from models.refiners.dense_crf import DenseCRF
    from utils.cam_files import label_path
    from utils.distributed import default_device
    from utils.files import claim_folder

    crf = DenseCRF(options.preset or RECIPES[options.recipe][0], steps=options.steps)
    values, device = tuple(options.values), default_device(options.device)
    job = Job(options.input, options.out, options.recipe, values, crf, device)
    images = find_images(options.input, options.images)
    settings = {"recipe": job.recipe, "values": values, "crf": crf.protocol}
    claim_folder(job.out, {"input": str(job.source.absolute()), **settings})
    work = write_label_of_probs if job.recipe == "probs" else write_label
    run_job(job, work, label_path, images, options.processes)
    return job.out


if __name__ == "__main__":
    command_line(Options, run, __doc__)
