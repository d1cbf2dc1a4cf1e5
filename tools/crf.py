"""Refine a folder of CAMs or probabilities by DenseCRF to label images.

    python tools/crf.py --input logs/run/cam --images photos --recipe irn --out logs/run/seeds
    python tools/crf.py --input probs --images photos --recipe probs --preset toco --out labels

``--input`` holds CAM files of tools/infer_cam.py, or files <name>.npz with ``probs`` (K, h, w) and, if
channel k is not class k, ``class_ids`` (K,). Maps smaller than the image are enlarged. Run again, it skips
what is finished.

Recipes for CAMs, each with the published DenseCRF parameters, run twice in one pass: what both runs call
background is background, what only the strict run does is ignored (255). ``--values`` changes their two
thresholds (strict, lax); one value runs the CRF once and ignores nothing.

    toco    softmax over [threshold, CAMs], thresholds 0.7 0.25
    irn     labels of confidence 0.7 from CAM thresholds 0.30 0.05 (also CDA, WS-FCN)
    psa     [(1 - largest CAM)^alpha, CAMs], alphas 4 32;  seam  the same with 4 24
"""

from __future__ import annotations

import argparse
import math
import sys
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from datasets.lists import IMAGE_SUFFIXES
from engine.pool import WorkerPool
from models.refiners.dense_crf import PRESETS, DenseCRF, energy_of_labels, energy_of_probs
from ops.cam import background_score
from ops.labels import merge_confident_labels
from utils.cam_files import cam_path, label_path, load_cam
from utils.cli import run_main
from utils.distributed import default_device
from utils.files import claim_folder
from utils.image import read_image, write_mask
from utils.logging import progress_bar
from utils.worker import core_count

# recipe: (DenseCRF preset, values of the strict and the lax run)
RECIPES: dict[str, tuple[str, tuple[float, ...]]] = {
    "toco": ("toco_pseudo_label", (0.7, 0.25)),
    "irn": ("irn", (0.30, 0.05)),
    "psa": ("psa", (4, 32)),
    "seam": ("seam", (4, 24)),
    "probs": ("toco", ()),
}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--input", required=True, help="folder of .npz files, also in subfolders")
    p.add_argument(
        "--images", required=True, help="folder of the images, <name>.jpg (or another image format)"
    )
    p.add_argument("--out", required=True, help="folder for the label images <name>.png")
    p.add_argument(
        "--recipe", required=True, choices=tuple(RECIPES), help="how maps become probabilities of labels"
    )
    p.add_argument(
        "--values", nargs="+", type=float, help="thresholds or alphas of the recipe: two (strict, lax) or one"
    )
    p.add_argument(
        "--preset", choices=tuple(PRESETS), help="DenseCRF parameters; default: those of the recipe"
    )
    p.add_argument("--steps", type=int, default=10, help="mean-field steps (default %(default)s)")
    p.add_argument("--device", default="auto", help="auto, cpu or cuda")
    p.add_argument("--processes", type=int, help="worker processes on the CPU; default: one for each core")
    return p


@dataclass(frozen=True)
class Job:
    """What a worker needs to know besides the name of the image."""

    source: Path
    images: Path
    out: Path
    recipe: str
    values: tuple[float, ...]
    crf: DenseCRF
    device: str


def run(cfg: Mapping[str, Any]) -> Path:
    """Refine every file that has no label image yet; returns the output folder.

    Args:
        cfg: the flags of the command line by name; those left out keep their defaults.
    """
    from tools.options import complete

    options = complete(parser(), cfg)
    preset, values = RECIPES[options.recipe]
    values = tuple(options.values) if options.values else values
    if len(values) not in ((0,) if options.recipe == "probs" else (1, 2)):
        count = "no" if options.recipe == "probs" else "one or two"
        raise ValueError(f"recipe {options.recipe} takes {count} values, got {values}")
    # The strict run has the higher threshold, or the lower alpha.
    falling = options.recipe in ("toco", "irn")
    in_range = all(0 < value < (1 if falling else math.inf) for value in values)
    if not in_range or (len(values) == 2 and (values[0] > values[1]) != falling):
        what = (
            "thresholds between 0 and 1, the higher first" if falling else "alphas above 0, the lower first"
        )
        raise ValueError(f"--values of recipe {options.recipe} are {what}, not {list(values)}")
    crf = DenseCRF(options.preset or preset, steps=options.steps)
    device = default_device(options.device)
    job = Job(
        Path(options.input), Path(options.images), Path(options.out), options.recipe, values, crf, device
    )
    names = find_names(job.source)
    left = [name for name in names if not label_path(job.out, name).is_file()]
    check_images(job, left)
    claim_folder(
        job.out,
        {"input": str(job.source.absolute()), "recipe": job.recipe, "values": values, "crf": crf.protocol},
    )
    with workers(job, len(names), len(left), options.processes) as submit:
        for name in left:
            submit(refine_file, job, name)
    return job.out


@contextmanager
def workers(job: Job, count: int, left: int, processes: int | None) -> Iterator[Callable[..., None]]:
    """A function ``submit(work, *arguments)`` whose calls run in processes, or in threads beside a GPU.

    Args:
        count: files in all; ``left`` of them are to do.
        processes: on the CPU; None: one for each core.
    """
    on_gpu = torch.device(job.device).type == "cuda"
    wanted = 2 if on_gpu else processes if processes is not None else core_count()
    print(
        f"output   {job.out}   ({count} files, {left} to do, {job.crf.protocol}, "
        f"{wanted} {'threads' if on_gpu else 'processes'})"
    )
    with (
        progress_bar(total=count, initial=count - left, desc="crf", unit="img") as bar,
        WorkerPool(min(wanted, left), threads=on_gpu) as pool,
    ):
        yield lambda work, *arguments: pool.submit(work, *arguments, then=lambda _: bar.update())
        pool.drain()


def find_names(folder: Path) -> list[str]:
    """Names of the .npz files of a folder, those of subfolders with their path."""
    names = sorted(path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.npz"))
    if not names:
        raise FileNotFoundError(
            f"there are no .npz files in {folder}: give the output folder of tools/infer_cam.py"
        )
    return names


def find_image(folder: Path, name: str) -> Path | None:
    """The image of a name, whatever its format."""
    candidates = (folder / f"{name}{suffix}" for suffix in IMAGE_SUFFIXES)
    return next((path for path in candidates if path.is_file()), None)


def check_images(job: Job, names: list[str]) -> None:
    """One error for all missing images, before hours of work."""
    missing = [name for name in names if find_image(job.images, name) is None]
    if missing:
        raise FileNotFoundError(
            f"{len(missing)} of {len(names)} images are missing in {job.images}, first {missing[0]}.jpg; "
            "set --images to their folder"
        )


def refine_file(job: Job, name: str) -> None:
    """One image from .npz to PNG."""
    path = find_image(job.images, name)
    assert path is not None
    image_rgb = read_pixels(path, job.device)
    source = cam_path(job.source, name)
    read = read_probs if job.recipe == "probs" else read_cam
    class_ids, maps = read(source)
    if len(maps) == 0:  # no class: nothing to decide
        write_mask(label_path(job.out, name), np.zeros(image_rgb.shape[1:], np.uint8))
        return
    maps = enlarge(maps, image_rgb)
    try:
        label = (
            refine_probs(job, image_rgb, maps) if job.recipe == "probs" else refine_cam(job, image_rgb, maps)
        )
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error
    write_mask(label_path(job.out, name), named(label, class_ids))


def read_pixels(path: Path, device: str) -> Tensor:
    """(3, H, W) uint8 of an image file."""
    return torch.from_numpy(np.array(read_image(path))).permute(2, 0, 1).to(device)


def enlarge(maps: Tensor, image_rgb: Tensor) -> Tensor:
    """Maps (K, h, w), K > 0, at the size and on the device of an image (3, H, W)."""
    maps = maps[None].to(image_rgb.device)
    return F.interpolate(maps, image_rgb.shape[1:], mode="bilinear", align_corners=False)[0]


def named(label: Tensor, class_ids: Tensor) -> np.ndarray:
    """Channel numbers (H, W) as class ids, uint8; 255 stays."""
    table = torch.full((256,), 255, dtype=torch.uint8, device=label.device)
    table[: len(class_ids)] = class_ids.to(table)
    return table[label].cpu().numpy()


def read_probs(path: Path) -> tuple[Tensor, Tensor]:
    """Class ids (K,) and probabilities (K, h, w).

    Raises:
        ValueError: a file without them, with values outside of [0, 1], or with ids that are no labels.
    """
    try:
        with np.load(path, allow_pickle=False) as arrays:
            probs = arrays["probs"]
            ids = arrays["class_ids"] if "class_ids" in arrays else np.arange(len(probs))
    except (KeyError, TypeError, ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} holds no array 'probs' (K, h, w), or is damaged ({error})") from error
    if probs.ndim != 3 or probs.dtype.kind != "f" or not probs.size or ids.shape != probs.shape[:1]:
        raise ValueError(
            f"{path}: probs must be floats (K, h, w) with K class ids, got {probs.dtype} {probs.shape} and "
            f"{ids.shape}"
        )
    if probs.min() < 0 or probs.max() > 1 + 1e-3 or not probs.max() > 0:
        raise ValueError(
            f"{path}: probs lie between {probs.min():.3g} and {probs.max():.3g}, not in [0, 1]; "
            "take the softmax of logits first"
        )
    if ids.dtype.kind not in "iu" or len(set(ids.tolist())) < len(ids) or ids.min() < 0 or ids.max() > 254:
        raise ValueError(f"{path}: class ids are {ids.tolist()}, not K different integers of 0..254")
    return torch.from_numpy(ids.astype(np.int64)), torch.from_numpy(probs).float()


def read_cam(path: Path) -> tuple[Tensor, Tensor]:
    """Class ids with background in front (n + 1,), and CAMs (n, h, w)."""
    cams = load_cam(path)
    return cams.label_ids, cams.cam


def refine_probs(job: Job, image_rgb: Tensor, probs: Tensor) -> Tensor:
    """(K, H, W) probabilities -> (H, W) channel numbers."""
    return job.crf.refine(image_rgb[None] / 255, probs[None])[0].argmax(0)


def refine_cam(job: Job, image_rgb: Tensor, cam: Tensor) -> Tensor:
    """(n, H, W) CAMs -> (H, W) 0 background, 1..n channel + 1, 255 ignore."""
    runs = [q.argmax(0) for q in cam_probs(job, image_rgb, cam)]
    return merge_confident_labels(*runs) if len(runs) == 2 else runs[0]


def cam_probs(job: Job, image_rgb: Tensor, cam: Tensor) -> list[Tensor]:
    """(n, H, W) CAMs -> (n + 1, H, W) probabilities, background first, for every value of the recipe."""
    energies = [cam_energy(job.recipe, cam, value)[None] for value in job.values]
    return [q[0] for q in job.crf.refine_energies(image_rgb[None] / 255, energies)]


def cam_energy(recipe: str, cam: Tensor, value: float) -> Tensor:
    """Energies (n + 1, H, W) of background and the classes; ``value`` is the recipe's threshold or alpha."""
    if recipe in ("psa", "seam"):
        return energy_of_probs(torch.cat([background_score(cam, value)[None], cam]))
    scores = torch.cat([torch.full_like(cam[:1], value), cam])
    if recipe == "irn":
        return energy_of_labels(scores.argmax(0), len(scores), confidence=0.7)
    return energy_of_probs(scores.softmax(0))


if __name__ == "__main__":
    from tools.options import parse

    run_main(lambda: run(parse(parser())))
