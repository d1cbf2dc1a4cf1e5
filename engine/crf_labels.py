"""Labels out of CAMs or probabilities by DenseCRF, many images at once.

K labels, n classes without background, H x W the image, h x w the stored maps.
"""

import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from datasets import custom
from datasets.base import Record
from datasets.lists import some
from models.refiners.dense_crf import DenseCRF, energy_of_labels, energy_of_probs
from ops.cam import background_score
from ops.labels import merge_confident_labels
from utils.cam_files import CamFile, ScoreFile, cam_path, label_path, load_cam, save_scores
from utils.files import has_date, keep_date
from utils.image import IGNORE_INDEX, MAX_CLASS, write_mask
from utils.logging import progress_bar
from utils.pool import WorkerPool, core_count


@dataclass(frozen=True)
class Job:
    """What a worker needs to know besides the image: ``values`` are the recipe's thresholds or alphas."""

    source: Path
    out: Path
    recipe: str
    values: tuple[float, ...]
    crf: DenseCRF
    device: str


def run_job(
    job: Job,
    work: Callable[[Job, Record], None],
    path_of: Callable[[Path, str], Path],
    images: Mapping[str, Record],
    processes: int | None,
) -> None:
    """Call ``work`` for every image without a file of this image and .npz, in processes, or threads of a GPU.

    Args:
        images: by name.
        processes: on the CPU; None: one for each core.
    """
    files = {
        name: (path_of(job.out, name), record.image, cam_path(job.source, name))
        for name, record in images.items()
    }
    left = {name: record for name, record in images.items() if not has_date(*files[name])}
    on_gpu = torch.device(job.device).type == "cuda"
    wanted = 2 if on_gpu else processes if processes is not None else core_count()
    print(f"output   {job.out}   ({len(images)} files, {len(left)} to do, {job.crf.protocol})")
    with (
        progress_bar(total=len(images), initial=len(images) - len(left), desc="crf", unit="img") as bar,
        WorkerPool(min(wanted, len(left)), threads=on_gpu) as pool,
    ):

        def finish(name: str, _: None) -> None:
            keep_date(*files[name])
            bar.update()

        for name, record in left.items():
            pool.submit(work, job, record, then=partial(finish, name))


def find_images(source: Path, folder: Path) -> dict[str, Record]:
    """The image of every .npz file of ``source``, also in subfolders.

    Raises:
        FileNotFoundError: there are no files, or images are missing.
    """
    names = sorted(path.relative_to(source).with_suffix("").as_posix() for path in source.rglob("*.npz"))
    if not names:
        raise FileNotFoundError(f"there are no .npz files in {source}, as tools/infer_cam.py writes them")
    found = custom.find_images(folder)
    if missing := [name for name in names if name not in found]:
        raise FileNotFoundError(f"{some(missing, len(names), 'images')} are not in {folder}: set --images")
    return {name: Record(name, found[name], None, None) for name in names}


def write_label(job: Job, record: Record) -> None:
    """The label image of a CAM file: 0 background, a class, 255 ignored."""
    cams, image_rgb = load_cam(cam_path(job.source, record.name)), read_pixels(record, job.device)
    label = torch.zeros(image_rgb.shape[1:], dtype=torch.int64)
    if len(cams.class_ids):
        probs = cam_probs(job, image_rgb, cams)
        runs = [q.argmax(0) for q in probs]
        label = merge_confident_labels(runs[0], runs[1]) if len(runs) == 2 else runs[0]
        if job.recipe == "clip_es":
            label = label.masked_fill(probs[0].amax(0) < job.values[0], IGNORE_INDEX)
    write_mask(label_path(job.out, record.name), named(label, cams.label_ids))


def write_label_of_probs(job: Job, record: Record) -> None:
    """The label image of a file of probabilities."""
    class_ids, probs = read_probs(cam_path(job.source, record.name))
    image_rgb = read_pixels(record, job.device)
    probs = job.crf.refine(image_rgb[None] / 255, enlarge(probs, image_rgb)[None])[0]
    write_mask(label_path(job.out, record.name), named(probs.argmax(0), class_ids))


def write_scores(job: Job, record: Record) -> None:
    """A score file: the probabilities with much and with little background."""
    cams, image_rgb = load_cam(cam_path(job.source, record.name)), read_pixels(record, job.device)
    scores = torch.ones(2, 1, *image_rgb.shape[1:])
    if len(cams.class_ids):
        scores = torch.stack(cam_probs(job, image_rgb, cams))
    save_scores(cam_path(job.out, record.name), ScoreFile(cams.class_ids, scores))


def read_pixels(record: Record, device: str) -> Tensor:
    """(3, H, W) uint8 of an image."""
    return torch.from_numpy(np.array(record.read_image())).permute(2, 0, 1).to(device)


def enlarge(maps: Tensor, image_rgb: Tensor) -> Tensor:
    """Maps (K, h, w), K > 0, at the size and on the device of an image (3, H, W)."""
    maps = maps[None].to(image_rgb.device)
    return F.interpolate(maps, image_rgb.shape[1:], mode="bilinear", align_corners=False)[0]


def named(label: Tensor, class_ids: Tensor) -> np.ndarray:
    """Channel numbers (H, W) as class ids; 255 stays, unless there are as many channels."""
    table = torch.full((max(256, len(class_ids)),), 255, device=label.device)
    table[: len(class_ids)] = class_ids.to(table)
    return table[label].cpu().numpy()


def read_probs(path: Path) -> tuple[Tensor, Tensor]:
    """Class ids (K,) and probabilities (K, h, w).

    Raises:
        ValueError: a file without them, or with values outside of [0, 1].
    """
    try:
        with np.load(path, allow_pickle=False) as arrays:
            probs = arrays["probs"]
            ids = arrays["class_ids"] if "class_ids" in arrays else np.arange(len(probs))
    except (KeyError, TypeError, ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} has no array 'probs' (K, h, w), or is damaged ({error})") from error
    if probs.ndim != 3 or probs.dtype.kind != "f" or len(probs) < 2 or ids.shape != probs.shape[:1]:
        raise ValueError(f"{path}: probs must be floats (K, h, w), background first, with K class ids")
    if probs.min() < 0 or not 0 < probs.max() <= 1 + 1e-3:
        raise ValueError(
            f"{path}: probs must be in [0, 1] (a softmax), got {probs.min():.3g} to {probs.max():.3g}"
        )
    if len({k for k in ids.tolist() if k in range(MAX_CLASS + 1)} - {IGNORE_INDEX}) < len(ids):
        raise ValueError(
            f"{path}: class ids must be K different integers in 0..{MAX_CLASS}, not 255, got {ids.tolist()}"
        )
    return torch.from_numpy(ids.astype(np.int64)), torch.from_numpy(probs).float()


def cam_probs(job: Job, image_rgb: Tensor, cams: CamFile) -> list[Tensor]:
    """(n + 1, H, W) probabilities, background first, of n > 0 CAMs for every value of the recipe."""
    cam = enlarge(cams.cam, image_rgb)
    energies = [cam_energy(job.recipe, cam, value)[None] for value in job.values]
    return [q[0] for q in job.crf.refine_energies(image_rgb[None] / 255, energies)]


def cam_energy(recipe: str, cam: Tensor, value: float) -> Tensor:
    """Energies (n + 1, H, W) of background and the classes; ``value`` is the recipe's threshold or alpha."""
    if recipe == "clip_es":
        value = 1.0
    if recipe in ("psa", "seam", "clip_es"):
        return energy_of_probs(torch.cat([background_score(cam, value)[None], cam]))
    scores = torch.cat([torch.full_like(cam[:1], value), cam])
    if recipe == "irn":
        return energy_of_labels(scores.argmax(0), len(scores), confidence=0.7)
    return energy_of_probs(scores.softmax(0))
