"""Labels out of CAMs or probabilities by DenseCRF, many images at once.

K labels, n classes without background, H x W the image, h x w the stored maps.
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from datasets.lists import IMAGE_SUFFIXES
from engine.pool import WorkerPool
from models.refiners.dense_crf import DenseCRF, energy_of_labels, energy_of_probs
from ops.cam import background_score
from ops.labels import merge_confident_labels
from utils.cam_files import ScoreFile, cam_path, label_path, load_cam, save_scores
from utils.image import read_image, write_mask
from utils.logging import progress_bar
from utils.worker import core_count


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

        def submit(work: Callable[..., None], *arguments: Any) -> None:
            pool.submit(work, *arguments, then=advance)

        def advance(_: None) -> None:
            bar.update()

        yield submit
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
    if len(probs) < 2:
        raise ValueError(f"{path} holds the probability of one class: the background's is needed too")
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
    return merge_confident_labels(runs[0], runs[1]) if len(runs) == 2 else runs[0]


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
