"""Labels that follow the masks of a segmenter which knows no classes, such as SAM or superpixels.

"Segment Anything Model (SAM) Enhanced Pseudo Labels for WSSS" (Chen et al., arXiv 2305.05803).

B images, M score maps with the background's first, (H, W) pixels. A mask is an array of flat pixel numbers.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from models.refiners.base import Refiner
from utils.build import build_part, check_number, suggest
from utils.image import IGNORE_INDEX, resize

SUFFIXES = (".json", ".npz", ".png")
SUPERPIXELS = ("felzenszwalb", "slic")  # of scikit-image


class MaskVote(Refiner):
    """Give whole masks to the classes whose regions they fit, see `vote`.

    Args:
        masks: folder with a file of masks for each image, see `read_masks`; None: superpixels.
        inside: a mask is taken when more than this share of it is in the region of a class,
        covers: or when it holds at least this share of that region; None: never for this reason.
        superpixels: ``felzenszwalb`` or ``slic`` of scikit-image, or a mapping of ``name`` and its arguments.
    """

    maps_compete = True

    def __init__(
        self,
        masks: str | Path | None = None,
        inside: float = 0.5,
        covers: float | None = 0.85,
        superpixels: str | Mapping[str, Any] = "felzenszwalb",
    ) -> None:
        check_number("mask_vote's inside", inside)
        check_number("mask_vote's covers", 1.0 if covers is None else covers)
        self.masks, self.inside, self.covers = None if masks is None else Path(masks), inside, covers
        self.superpixels = {"name": superpixels} if isinstance(superpixels, str) else dict(superpixels)
        self.image_name: str | None = None
        if self.masks is not None and not self.masks.is_dir():
            raise FileNotFoundError(f"mask_vote: folder of masks {masks} does not exist")
        if (kind := self.superpixels.get("name")) not in SUPERPIXELS:
            raise ValueError(f"mask_vote: unknown superpixels '{kind}'{suggest(str(kind), SUPERPIXELS)}")

    @property
    def protocol(self) -> str:
        """What was run, for protocol ids."""
        source = self.masks.name if self.masks else ",".join(str(v) for v in self.superpixels.values())
        changes = {"inside": (self.inside, 0.5), "covers": (self.covers, 0.85)}
        return f"mask_vote({','.join([source, *(f'{k}={v}' for k, (v, d) in changes.items() if v != d)])})"

    def of_image(self, name: str) -> MaskVote:
        refiner = copy(self)
        refiner.image_name = name
        return refiner

    def refine(self, image_rgb: Tensor, scores: Tensor) -> Tensor:
        return self.refine_all(image_rgb, [scores])[0]

    @torch.no_grad()
    def refine_all(self, image_rgb: Tensor, scores: Sequence[Tensor]) -> list[Tensor]:
        """The scores, those of two maps exchanged where the vote changes the strongest one."""
        masks = [list(self.masks_of(image)) for image in image_rgb]
        refined = []
        for stack in scores:
            stack = resize(stack.float(), image_rgb.shape[-2:])
            label = stack.max(1).indices
            votes = [vote(lb.cpu().numpy(), m, self.inside, self.covers) for lb, m in zip(label, masks)]
            voted = torch.from_numpy(np.stack(votes)).to(label)
            old, new = stack.gather(1, label[:, None]), stack.gather(1, voted[:, None])
            refined.append(stack.scatter(1, label[:, None], new).scatter(1, voted[:, None], old))
        return refined

    def masks_of(self, image: Tensor) -> Iterable[np.ndarray]:
        """The masks of an image (3, H, W) in [0, 1]."""
        if self.masks is None:
            return superpixels(image, **self.superpixels)
        if self.image_name is None:
            raise ValueError("mask_vote finds masks by an image's name, which training lacks: leave them out")
        return read_masks(self.masks, self.image_name, image.shape[-2:])


def vote(
    label: np.ndarray, masks: Iterable[np.ndarray], inside: float = 0.5, covers: float | None = 0.85
) -> np.ndarray:
    """A label (H, W), 0 background and 255 ignored, whose objects are masks; see `MaskVote`.

    A mask becomes that class, of those which it fits, whose region it shares most pixels with. Where taken
    masks overlap, the one wins that has the largest share of its pixels in its class. The object pixels in
    masks that no class takes become background; a pixel in no mask keeps its label, and an ignored pixel
    (255) does unless its mask is taken.
    """
    flat = label.ravel().astype(np.int64)
    region = np.bincount(flat, minlength=IGNORE_INDEX + 1)  # pixels of every class
    is_covered = np.zeros(flat.shape, bool)
    taken = []
    for pixels in masks:
        is_covered[pixels] = True
        overlap = np.bincount(flat[pixels], minlength=len(region))
        overlap[[0, IGNORE_INDEX]] = 0
        fits = overlap > inside * len(pixels)
        if covers is not None:
            fits |= (overlap >= covers * region) & (overlap > 0)
        if fits.any():
            winner = int(np.where(fits, overlap, 0).argmax())
            taken.append((overlap[winner] / len(pixels), winner, pixels))
    voted = np.where(is_covered & (flat != IGNORE_INDEX), 0, flat)
    for _, winner, pixels in sorted(taken, key=lambda mask: mask[0]):
        voted[pixels] = winner
    return voted.reshape(label.shape).astype(label.dtype)


def superpixels(image: Tensor, name: str, **options: Any) -> list[np.ndarray]:
    """The superpixels of an image (3, H, W) in [0, 1], by ``name`` of scikit-image."""
    try:
        from skimage import segmentation
    except ImportError as error:
        raise ImportError("superpixels need scikit-image: pip install scikit-image") from error
    pixels = image.movedim(0, -1).cpu().numpy()
    index = build_part(getattr(segmentation, name), options, pixels, key="the superpixels")
    return parts(index)


def parts(index: np.ndarray) -> list[np.ndarray]:
    """The pixels of every value of an index map (H, W), values ascending."""
    order = np.argsort(index, axis=None, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(index.ravel()[order])) + 1)


def read_masks(folder: Path, name: str, size: Sequence[int]) -> Iterator[np.ndarray]:
    """The masks of an image of ``size`` (H, W); those of another resolution are resized (nearest).

    ``<name>.json``: a list of COCO annotations, or a mapping with them under ``annotations``, as SAM's
    automatic generator writes them (run-length codes or polygons under ``segmentation``).
    ``<name>.npz``: ``masks`` (N, H, W), or ``segments`` (H, W) with a number for every mask, 0 for none.
    ``<name>.png``: such numbers, in 8 or 16 bits.

    Raises:
        FileNotFoundError: there is no file of the image.
        ValueError: it holds something else, or masks of another shape than the image.
    """
    paths = [path for suffix in SUFFIXES if (path := folder / f"{name}{suffix}").is_file()]
    if not paths:
        raise FileNotFoundError(f"masks {folder / name} are missing ({', '.join(SUFFIXES)})")
    try:
        masks = _read(paths[0], size)
    except (KeyError, ValueError, TypeError, OSError) as error:
        raise ValueError(f"{paths[0]} contains no masks, or is damaged ({error})") from error
    for mask in masks:
        if mask.ndim != 2 or abs(mask.shape[0] - mask.shape[1] * size[0] / size[1]) > 2:
            raise ValueError(f"{paths[0]} has masks of {mask.shape} pixels, its image has {tuple(size)}")
        rows, columns = (np.arange(n) * m // n for n, m in zip(size, mask.shape))
        mask = mask[np.ix_(rows, columns)]
        yield from (pixels for pixels in parts(mask) if mask.flat[pixels[0]])


def _read(path: Path, size: Sequence[int]) -> Iterable[np.ndarray]:
    """Maps of mask numbers, 0 for none; one for each mask where masks may overlap."""
    if path.suffix == ".png":
        with Image.open(path) as image:
            return [np.asarray(image).astype(np.int64)]
    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as arrays:
            if "segments" in arrays:
                return [arrays["segments"]]
            masks = arrays["masks"]
            return masks.reshape(-1, *masks.shape[-2:]) > 0
    from pycocotools import mask as coco

    content = json.loads(path.read_text("utf-8"))
    found = []
    for annotation in content["annotations"] if isinstance(content, dict) else content:
        code = annotation["segmentation"]
        if isinstance(code, list) or isinstance(code["counts"], list):  # polygons, or lengths as numbers
            height, width = size if isinstance(code, list) else code["size"]
            code = coco.frPyObjects(code, height, width)
        code = coco.merge(code) if isinstance(code, list) else code
        found.append(coco.decode(code))
    return found
