"""Confident labels for affinity networks, from a folder of CAMs and the images.

    python tools/make_affinity_label.py --cam logs/run/cam --out logs/run/seeds config=configs/irn/voc.yaml
    python tools/make_affinity_label.py --cam logs/run/cam --out logs/run/seeds --images photos --mode psa

DenseCRF runs twice on every image. ``irn`` writes label images: what beats a high threshold is foreground,
what stays below a low one is background, the rest is ignored (255). ``psa`` and ``seam`` write both runs as
scores (utils/cam_files.py, ``ScoreFile``), because training averages them over the cells of its grid. Run
again, it skips what is finished.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from models.refiners.dense_crf import DenseCRF
from tools.crf import RECIPES, Job, cam_probs, enlarge, find_image, find_names, named, read_pixels, refine_cam
from tools.crf import workers as crf_workers
from utils.cam_files import ScoreFile, cam_path, label_path, load_cam, save_scores
from utils.cli import count, positive, run_main
from utils.distributed import default_device
from utils.files import claim_folder, origin_of, require_files
from utils.image import write_mask

MODES = ("irn", "psa", "seam")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="further arguments: config=FILE and key=value changes of it",
    )
    p.add_argument("--cam", required=True, help="folder of CAM files <name>.npz (tools/infer_cam.py)")
    p.add_argument("--images", help="folder of the images; default: those of the config's data set")
    p.add_argument("--split", help="split or list file (.txt) of the config; default: data.train_set")
    p.add_argument("--model_path", help="checkpoint whose config describes the data set; or give config=FILE")
    p.add_argument("--data_root", help="folder of the data set; default: that of the config")
    p.add_argument("--mode", default="irn", choices=MODES, help="what is written (default %(default)s)")
    p.add_argument(
        "--foreground_threshold", type=float, help="irn: CAM above it is foreground (default 0.30)"
    )
    p.add_argument(
        "--background_threshold", type=float, help="irn: CAM up to it is background (default 0.05)"
    )
    p.add_argument("--low_alpha", type=float, help="psa, seam: exponent for much background (default 4)")
    p.add_argument(
        "--high_alpha", type=float, help="psa, seam: exponent for little background (default 32, seam 24)"
    )
    p.add_argument("--steps", type=positive, default=10, help="mean-field steps (default %(default)s)")
    p.add_argument("--out", required=True, help="folder for the label files <name>.png or <name>.npz")
    p.add_argument("--device", default="auto", help="auto, cpu or cuda")
    p.add_argument("--processes", type=count, help="worker processes on the CPU; default: one for each core")
    return p


def run(cfg: Mapping[str, Any]) -> Path:
    """Make every label that is not there yet; returns the output folder.

    Args:
        cfg: the flags of the command line by name; those left out keep their defaults.
    """
    # Here, because workers import this file and need none of the networks behind it.
    from tools.options import complete

    options = complete(parser(), cfg)
    values = check(options)
    is_irn = options.mode == "irn"
    crf = DenseCRF(RECIPES[options.mode][0], steps=options.steps)
    folders = (Path(folder or "").expanduser() for folder in (options.cam, options.images, options.out))
    job = Job(*folders, options.mode, tuple(values.values()), crf, default_device(options.device))
    images, source = find_images(options)
    path_of, work = (label_path, write_label) if is_irn else (cam_path, write_scores)
    settings = {
        "cam": origin_of(job.source),
        **source,
        "mode": options.mode,
        "crf": crf.protocol,
    }
    claim_folder(job.out, settings | values)
    left = {name: path for name, path in images.items() if not path_of(job.out, name).is_file()}
    with crf_workers(job, len(images), len(left), options.processes) as submit:
        for name, path in left.items():
            submit(work, job, name, path)
    return job.out


def check(options: argparse.Namespace) -> dict[str, float]:
    """The thresholds or exponents of the mode, the strict one first.

    Raises:
        ValueError: they are the wrong way round.
    """
    is_irn = options.mode == "irn"
    names = ("foreground_threshold", "background_threshold") if is_irn else ("low_alpha", "high_alpha")
    given = {name: getattr(options, name) for name in names}
    defaults = dict(zip(names, RECIPES[options.mode][1], strict=True))
    strict, lax = names
    values = {name: defaults[name] if value is None else value for name, value in given.items()}
    if not (values[strict] > values[lax] if is_irn else values[strict] < values[lax]):
        relation = "below" if is_irn else "above"
        raise ValueError(f"{lax}={values[lax]} must be {relation} {strict}={values[strict]}")
    return values


def find_images(options: argparse.Namespace) -> tuple[dict[str, Path], dict[str, str]]:
    """Image file of every name, of all CAM files or of all images of a split, and what names the choice.

    Raises:
        FileNotFoundError: images or CAM files are missing.
    """
    folder = Path(options.cam).expanduser()
    if options.images:
        images = Path(options.images).expanduser()
        found = {name: find_image(images, name) for name in find_names(folder)}
        missing = [name for name, path in found.items() if path is None]
        if missing:
            raise FileNotFoundError(
                f"{len(missing)} of {len(found)} images are missing in {images}, first {missing[0]}.jpg"
            )
        chosen = {"images": str(images.absolute())}
        return {name: path for name, path in found.items() if path is not None}, chosen
    from engine.data import load_split
    from engine.scores.records import short_name
    from tools.evaluate import data_config

    data = data_config(options).data
    split = load_split(data, options.split or data.train_set)
    require_files(
        (cam_path(folder, record.name) for record in split.records),
        f"CAM files of split '{split.name}'",
        "finish tools/infer_cam.py on that split, or name another with --split",
    )
    chosen = {"split": short_name(split), "data_fingerprint": split.fingerprint()}
    return {record.name: record.image for record in split.records}, chosen


def write_label(job: Job, name: str, image: Path) -> None:
    """A label image: 0 background, a class, 255 ignored."""
    cams, image_rgb = load_cam(cam_path(job.source, name)), read_pixels(image, job.device)
    if len(cams.class_ids):
        label = refine_cam(job, image_rgb, enlarge(cams.cam, image_rgb))
    else:
        label = image_rgb.new_zeros(image_rgb.shape[1:]).long()
    write_mask(label_path(job.out, name), named(label, cams.label_ids))


def write_scores(job: Job, name: str, image: Path) -> None:
    """A score file: the probabilities with much and with little background."""
    cams, image_rgb = load_cam(cam_path(job.source, name)), read_pixels(image, job.device)
    if len(cams.class_ids):
        scores = torch.stack(cam_probs(job, image_rgb, enlarge(cams.cam, image_rgb)))
    else:
        scores = torch.ones(2, 1, *image_rgb.shape[1:])
    save_scores(cam_path(job.out, name), ScoreFile(cams.class_ids, scores))


if __name__ == "__main__":
    from tools.options import parse

    run_main(lambda: run(parse(parser())))
