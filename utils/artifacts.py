"""The files that inference writes and later steps read: CAMs, label images, scores, and the settings they
were made with.

    <folder>/settings.json     what made the folder; another checkpoint or other settings are refused
    <folder>/<name>.png        label as a palette PNG of class indices, original size
    <folder>/<name>.npz        CAM file (see :func:`save_cam`)
    <folder>/scores.json       every score of the folder with its protocol id and provenance

No file holds a pickle, so reading one cannot run code; every file appears complete or not at all.
"""

from __future__ import annotations

import io
import json
import os
import socket
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from utils.config import differences
from utils.distributed import is_main

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

SCORES_FORMAT = "tag2mask-scores/1"
SETTINGS = "settings.json"
FILES = (".png", ".npz", ".npy")  # of labels, CAMs and scores


def write_atomic(path: Path, content: bytes) -> None:
    """Write a file so that it is complete at every moment, whenever the process dies."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write plain values as readable JSON, atomically."""
    write_atomic(path, (json.dumps(value, indent=1, allow_nan=False) + "\n").encode())


def read_json(path: Path) -> Any:
    """Read a JSON file; a damaged one is a ValueError that names it."""
    try:
        return json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}); delete it or make it anew") from error


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Keep other runs out of a folder that this one writes to; the main process does it for all.

    The lock ends with the process, however that ends.

    Raises:
        ValueError: another process holds the folder.
    """
    if fcntl is None or not is_main():
        yield
        return
    with (folder / ".lock").open("a+") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            file.seek(0)
            raise ValueError(
                f"{folder} is in use by {file.read() or 'another process'}: wait until it ends, stop it, or "
                "choose another run_name="
            ) from error
        except OSError:  # a file system without locks
            pass
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield


def label_path(folder: Path, name: str) -> Path:
    """Where the label image of ``name`` lies; names may hold folders (``train2014/0001``)."""
    return folder / f"{name}.png"


def require_files(paths: Iterable[Path], what: str, advice: str) -> None:
    """Raise one FileNotFoundError that counts what is missing, names the first, and says what to do."""
    paths = list(paths)
    there = {folder: _files_in(folder) for folder in {path.parent for path in paths}}
    missing = [path for path in paths if path.name not in there[path.parent]]
    if missing:
        raise FileNotFoundError(
            f"{len(missing)} of {len(paths)} {what} are missing, first {missing[0]}; {advice}"
        )


def _files_in(folder: Path) -> set[str]:
    # One listing instead of thousands of look-ups, which are slow on network disks.
    if not folder.is_dir():
        return set()
    with os.scandir(folder) as entries:
        return {entry.name for entry in entries if entry.is_file()}


@dataclass(frozen=True)
class CamFile:
    """CAMs of the classes that an image is tagged with.

    Args:
        class_ids: (n,) int64 mask values 1..C of the channels, ascending.
        cam: (n, h, w) float32 in [0, 1]; h, w may be smaller than the image.
        aux_cam: the same from the auxiliary block, or None.
        size: (H, W) of the image.
        strided: (n, ceil(H / 4), ceil(W / 4)) the CAMs summed and normalised at stride 4, where IRN's random
            walk starts, or None.
    """

    class_ids: Tensor
    cam: Tensor
    aux_cam: Tensor | None
    size: tuple[int, int]
    strided: Tensor | None = None

    @property
    def label_ids(self) -> Tensor:
        """(1 + n,) int64 mask values with the background in front: what a label of channel numbers means."""
        return torch.cat([self.class_ids.new_zeros(1), self.class_ids])


def cam_path(folder: Path, name: str) -> Path:
    """Where the CAM file of ``name`` lies."""
    return folder / f"{name}.npz"


def save_cam(path: Path, cams: CamFile, dtype: str = "float16") -> None:
    """Write a CAM file: ``class_ids`` int16, ``cam`` and, if there are any, ``aux_cam`` and ``strided`` as
    ``dtype``, ``size`` int32.

    Half precision moves a value by at most 2.5e-4, far less than the step of a threshold sweep.
    """
    arrays = {
        "class_ids": cams.class_ids.cpu().numpy().astype(np.int16),
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
        FileNotFoundError: there is none.
        ValueError: the file is damaged or is something else.
    """
    with _open_arrays(path, "CAM file", "tools/infer_cam.py") as arrays:
        aux_cam, strided = (
            torch.from_numpy(arrays[name]).float() if name in arrays else None
            for name in ("aux_cam", "strided")
        )
        height, width = (int(v) for v in arrays["size"])
        return CamFile(
            class_ids=torch.from_numpy(arrays["class_ids"]).long(),
            cam=torch.from_numpy(arrays["cam"]).float(),
            aux_cam=aux_cam,
            size=(height, width),
            strided=strided,
        )


@dataclass(frozen=True)
class ScoreFile:
    """Two readings of where an image's classes are, with much and with little background (PSA).

    Args:
        class_ids: (n,) int64 mask values 1..C of the channels after the first, ascending.
        scores: (2, 1 + n, H, W) float32 in [0, 1]: with much background (low alpha), then with little (high
            alpha). Channel 0 is the background.
    """

    class_ids: Tensor
    scores: Tensor


def save_scores(path: Path, file: ScoreFile) -> None:
    """Write a score file: ``class_ids`` int16, ``scores`` float16; training averages 64 of them."""
    _write_arrays(
        path,
        class_ids=file.class_ids.cpu().numpy().astype(np.int16),
        scores=file.scores.float().cpu().numpy().astype(np.float16),
    )


def load_scores(path: Path) -> ScoreFile:
    """Read a score file.

    Raises:
        FileNotFoundError: there is none.
        ValueError: the file is damaged or is something else.
    """
    with _open_arrays(path, "score file", "tools/make_affinity_label.py") as arrays:
        return ScoreFile(
            class_ids=torch.from_numpy(arrays["class_ids"]).long(),
            scores=torch.from_numpy(arrays["scores"]).float(),
        )


def _write_arrays(path: Path, **arrays: np.ndarray) -> None:
    """One compressed .npz file, whole or not at all."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]
    write_atomic(path, buffer.getvalue())


@contextmanager
def _open_arrays(path: Path, kind: str, maker: str) -> Iterator[Mapping[str, np.ndarray]]:
    """The arrays of a .npz file; what goes wrong in the block means that it is damaged or another kind."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no {kind} {path}: run {maker} first")
    try:
        with np.load(path, allow_pickle=False) as arrays:
            yield arrays
    except (KeyError, ValueError, OSError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"{path} is not a {kind} of this project, or damaged ({error}); delete it and run again"
        ) from error


def claim_folder(folder: Path, settings: Mapping[str, Any]) -> None:
    """Mark ``folder`` as made with ``settings``, or check that it was.

    Finished files are taken over when a run is repeated, so they must come from the same checkpoint and
    settings.

    Raises:
        ValueError: the folder was made with something else (names every difference), or holds foreign images.
    """
    path = folder / SETTINGS
    settings = json.loads(json.dumps(settings))  # tuples become lists, as they will be read back
    if not path.is_file():
        foreign = next((file for file in folder.rglob("*.*") if file.suffix in FILES), None)
        if foreign is not None:
            raise ValueError(
                f"{folder} already holds files that no run of this tool made, for example {foreign.name} "
                "(there is no settings.json): choose another folder with --out"
            )
        write_json(path, settings)
        return
    if changed := differences(read_json(path), settings):
        raise ValueError(
            f"{folder} holds results of other settings ({'; '.join(changed)}): choose another folder with "
            "--out, or delete this one"
        )


def made_with(folder: Path) -> dict[str, Any]:
    """The settings that `claim_folder` wrote into a folder; empty for a folder of something else."""
    path = folder / SETTINGS
    return read_json(path) if path.is_file() else {}


def origin_of(folder: Path) -> dict[str, Any]:
    """What the files of a folder are, for the settings of a tool that reads them.

    That is how they were made, wherever they lie; of files from elsewhere only the place is known.
    """
    return made_with(folder) or {"folder": str(folder.absolute())}


def read_scores(folder: Path) -> list[dict[str, Any]]:
    """The score records of a folder, oldest first; empty without a file."""
    path = folder / "scores.json"
    if not path.is_file():
        return []
    content = read_json(path)
    if not isinstance(content, dict) or content.get("format") != SCORES_FORMAT:
        raise ValueError(f"{path} is not a score file of this project ({SCORES_FORMAT}); move it away")
    return content["scores"]


def write_scores(folder: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Add score records to ``scores.json``.

    A record replaces an earlier one of the same protocol on the same checkpoint (of a training, the same
    step), data and settings (a repeated run); a record of anything else is kept beside it.
    """
    kept = read_scores(folder)
    for record in records:
        kept = [old for old in kept if _identity(old) != _identity(record)] + [dict(record)]
    write_json(folder / "scores.json", {"format": SCORES_FORMAT, "scores": kept})


def _identity(record: Mapping[str, Any]) -> str:
    provenance = record.get("provenance", {})
    parts = [record.get("protocol"), record.get("settings")]
    # A training has no file to hash yet. Its steps stand for its networks, in the form that records of
    # earlier versions hold in the place of the hash.
    parts.append(provenance.get("checkpoint_sha256") or f"step {provenance.get('step')}")
    parts += [provenance.get(key) for key in ("data_fingerprint", "split")]
    return json.dumps(parts, sort_keys=True)
