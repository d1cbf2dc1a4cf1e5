"""Confident labels for affinity networks, from a folder of CAMs and the images.

    python tools/make_affinity_label.py --cam logs/run/cam --out logs/run/seeds config=configs/irn/voc.yaml
    python tools/make_affinity_label.py --cam logs/run/cam --out logs/run/seeds --images photos --mode psa

DenseCRF runs twice on every image, strict and lax. ``irn`` writes label images (255 where the runs differ),
``psa`` and ``seam`` both runs as scores. Run again, it skips what is finished.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from engine.config.common import DataOptions
from engine.config.options import command_line, option
from tools.crf import RECIPES


@dataclass(kw_only=True)
class Options(DataOptions):
    cam: Path = option(meaning="folder of CAM files <name>.npz (tools/infer_cam.py)", reads=True)
    images: Path | None = option(None, "folder of the images; default: those of the data set", reads=True)
    split: str | None = option(None, "split or list (.txt); default: data.train_set", reads="images")
    mode: str = option("irn", "what is written", choices=("irn", "psa", "seam"))
    foreground_threshold: float | None = option(None, "irn: CAM above it is foreground (default 0.30)")
    background_threshold: float | None = option(None, "irn: CAM up to it is background (default 0.05)")
    low_alpha: float | None = option(None, "psa, seam: exponent for much background (default 4)")
    high_alpha: float | None = option(None, "psa, seam: exponent for little background (default 32, seam 24)")
    steps: int = option(10, "mean-field steps", least=1)
    out: Path = option(meaning="folder for the label files <name>.png or <name>.npz")
    device: str = option("auto", "auto, cpu or cuda", free=True)
    processes: int | None = option(None, "worker processes on the CPU; default: one for each core", free=True)

    def __post_init__(self) -> None:
        (strict, high), (lax, low) = self.values().items()
        is_irn = self.mode == "irn"
        if not (high > low if is_irn else high < low):
            raise ValueError(f"{lax}={low} must be {'below' if is_irn else 'above'} {strict}={high}")

    def values(self) -> dict[str, float]:
        """The thresholds or exponents of the mode, the strict one first."""
        is_irn = self.mode == "irn"
        names = ("foreground_threshold", "background_threshold") if is_irn else ("low_alpha", "high_alpha")
        given = (getattr(self, name) for name in names)
        defaults = RECIPES[self.mode][1]
        return {n: d if v is None else v for n, d, v in zip(names, defaults, given, strict=True)}


def run(options: Options) -> Path:
    """Make every label that is not there yet; returns the output folder."""
    from engine.crf_labels import Job, find_images, run_job, write_label, write_scores
    from engine.data import data_config, load_split
    from engine.scores.records import short_name
    from models.refiners.dense_crf import DenseCRF
    from utils.cam_files import cam_path, label_path
    from utils.distributed import default_device
    from utils.files import claim_folder, origin_of

    values, device = options.values(), default_device(options.device)
    crf = DenseCRF(RECIPES[options.mode][0], steps=options.steps)
    if options.images:
        images = find_images(options.cam, options.images)
        source = {"images": str(options.images.absolute())}
    else:
        data = data_config(options).data
        split = load_split(data, options.split or data.train_set)
        split.require(options.cam, cam_path, "tools/infer_cam.py")
        images = {record.name: record for record in split.records}
        source = {"split": short_name(split), "data_fingerprint": split.fingerprint()}
    job = Job(options.cam, options.out, options.mode, tuple(values.values()), crf, device)
    settings = {"cam": origin_of(options.cam), **source, "mode": options.mode, "crf": crf.protocol}
    claim_folder(options.out, settings | values)
    path_of, work = (label_path, write_label) if options.mode == "irn" else (cam_path, write_scores)
    run_job(job, work, path_of, images, options.processes)
    return options.out


if __name__ == "__main__":
    command_line(Options, run, __doc__)
