"""The files of images that inference writes and later steps read: labels (.png), CAMs and scores (.npz).

No file holds a pickle, so reading one cannot run code; every file appears complete or not at all.
"""

import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from utils.files import atomic_file


def label_path(folder: Path, name: str) -> Path:
    """Where the label image of ``name`` lies; names may hold folders (``train2014/0001``)."""
    return folder / f"{name}.png"


@dataclass(frozen=True)
class CamFile:
    """CAMs of the classes that an image is tagged with."""

    class_ids: Tensor  # (n,) int64 mask values 1..C of the channels, ascending
    cam: Tensor  # (n, h, w) float32 in [0, 1]; h, w may be smaller than the image
    aux_cam: Tensor | None  # the same from the auxiliary block
    size: tuple[int, int]  # (H, W) of the image
    # (n, ceil(H / 4), ceil(W / 4)): summed and normalised at stride 4, where IRN's random walk starts.
    strided: Tensor | None = None

    @property
    def label_ids(self) -> Tensor:
        """(1 + n,) int64 mask values with the background in front: what a label of channel numbers means."""
        return torch.cat([self.class_ids.new_zeros(1), self.class_ids])


def cam_path(folder: Path, name: str) -> Path:
    """Where the CAM file of ``name`` lies."""
    return folder / f"{name}.npz"


def save_cam(path: Path, cams: CamFile, dtype: str = "float16") -> None:
    """Write a CAM file. Half precision moves a value by at most 2.5e-4, far less than a step of a sweep."""
    arrays = {
        "class_ids": _short(cams.class_ids),
        "cam": cams.cam.float().cpu().numpy().astype(dtype),
        "size": np.array(cams.size, dtype=np.int32),
    }
    for name, maps in (("aux_cam", cams.aux_cam), ("strided", cams.strided)):
        if maps is not None:
            arrays[name] = maps.float().cpu().numpy().astype(dtype)
    _write_arrays(path, **arrays)


def load_cam(path: Path) -> CamFile:
    """Read a CAM file.

    Raises:
        FileNotFoundError, ValueError: there is none, or it is damaged or something else.
    """
    with open_arrays(path, "CAM file", "tools/infer_cam.py") as arrays:
        names = [name for name in ("cam", "aux_cam", "strided") if name in arrays]
        maps = {name: torch.from_numpy(arrays[name]).float() for name in names}
        height, width = (int(v) for v in arrays["size"])
        class_ids = torch.from_numpy(arrays["class_ids"]).long()
        return CamFile(class_ids, maps["cam"], maps.get("aux_cam"), (height, width), maps.get("strided"))


@dataclass(frozen=True)
class ScoreFile:
    """Two readings of where an image's classes are, with much and with little background (PSA)."""

    class_ids: Tensor  # (n,) int64 mask values 1..C of the channels after the background, ascending
    # (2, 1 + n, H, W) float32 in [0, 1]: with much background (low alpha), then with little (high alpha).
    scores: Tensor


def save_scores(path: Path, file: ScoreFile) -> None:
    """Write a score file in half precision; training averages 64 of its values."""
    _write_arrays(
        path,
        class_ids=_short(file.class_ids),
        scores=file.scores.float().cpu().numpy().astype(np.float16),
    )


def load_scores(path: Path) -> ScoreFile:
    """Read a score file; raises as `load_cam`."""
    with open_arrays(path, "score file", "tools/make_affinity_label.py") as arrays:
        return ScoreFile(
            class_ids=torch.from_numpy(arrays["class_ids"]).long(),
            scores=torch.from_numpy(arrays["scores"]).float(),
        )


def _short(class_ids: Tensor) -> np.ndarray:
    """Class ids as int16, or as int32 where they need it."""
    ids = class_ids.cpu().numpy()
    return ids.astype(np.int16 if ids.max(initial=0) < 2**15 else np.int32)


def _write_arrays(path: Path, **arrays: np.ndarray) -> None:
    """One compressed .npz file, whole or not at all."""
    with atomic_file(path) as file:
        np.savez_compressed(file, **arrays)  # type: ignore[arg-type]


@contextmanager
def open_arrays(path: Path, kind: str, maker: str) -> Iterator[Mapping[str, np.ndarray]]:
    """The arrays of a .npz file; what goes wrong in the block means that it is damaged or another kind."""
    if not path.is_file():
        raise FileNotFoundError(f"{kind} {path} is missing: run {maker} first")
    try:
        with np.load(path, allow_pickle=False) as arrays:
            yield arrays
    except (KeyError, ValueError, OSError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is no {kind} of this project, or damaged ({error}): delete it") from error
