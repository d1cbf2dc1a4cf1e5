"""CAM files of other programs: pickled dictionaries; h, w are ceil(H / 4), ceil(W / 4).

IRN, CDA    {"keys": (n,) class indices from 0, "cam": (n, h, w), "high_res": (n, H, W)}
PSA, SEAM   {class index from 0: (H, W)}
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from utils.cam_files import CamFile
from utils.npy_dictionary import read_npy_dictionary


class NoClassError(ValueError):
    """A CAM file of PSA's form without any class: it does not say how large its image is."""


def load_foreign_cam(path: Path) -> CamFile:
    """Read a CAM file of IRN, CDA, PSA or SEAM.

    Raises:
        NoClassError: the file is an empty dictionary.
        ValueError: as `read_npy_dictionary`, and for a dictionary of another form.
    """
    content = read_npy_dictionary(path)
    if not content:
        raise NoClassError(f"{path} holds no class")
    try:
        if "high_res" in content:
            ids = _tensor(content["keys"]).long()
            cam, strided = _tensor(content["high_res"]).float(), _tensor(content["cam"]).float()
        else:
            order = sorted(content)
            ids, strided = torch.tensor([int(k) for k in order]), None
            cam = torch.stack([_tensor(content[k]).float() for k in order])
        for maps in (cam,) if strided is None else (cam, strided):
            if maps.ndim != 3 or len(maps) != len(ids):
                raise ValueError(f"{len(ids)} classes, but maps are {tuple(maps.shape)}")
            # Not below 0: SEAM's maps end under it where they are weakest.
            if maps.numel() and not (maps.isfinite().all() and maps.max() <= 1.001):
                raise ValueError(f"maps hold values up to {float(maps.max()):.3g}; CAMs are at most 1")
        if (ids < 0).any() or len(ids.unique()) != len(ids):
            raise ValueError(f"class indices {ids.tolist()} are not different numbers from 0")
        if strided is None and 0 in content and (cam.sum(0) - 1).abs().max() < 0.01:
            raise ValueError("its maps add up to 1: scores of background and classes, not CAMs")
        return CamFile(ids + 1, cam, None, (cam.shape[1], cam.shape[2]), strided)
    except (KeyError, IndexError, TypeError, ValueError, RuntimeError) as error:
        keys = ", ".join(map(str, list(content)[:5]))
        raise ValueError(f"{path} is not a CAM file of IRN or PSA: its keys are {keys} ({error})") from error


def _tensor(value: object) -> Tensor:
    return value.detach() if isinstance(value, Tensor) else torch.from_numpy(np.array(value))
