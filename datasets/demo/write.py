"""Write the generated scenes of the demo as a data set in VOC layout."""

from __future__ import annotations

import hashlib
import io
import json
import multiprocessing
import os
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from datasets.demo.contexts import CONTEXTS
from datasets.demo.scene import SPLITS, SceneOptions, context_given_class, render_scene
from datasets.tags import write_tags
from utils.files import read_json, write_atomic, write_json
from utils.image import read_mask, write_mask
from utils.logging import progress_bar
from utils.mappings import differences
from utils.worker import start_worker

FORMAT = "tag2mask/synthetic-1"  # a change of what is drawn for the same options needs a new number
IMAGES, MASKS, LISTS = "JPEGImages", "SegmentationClass", "ImageSets"
CHUNK = 50  # images that a process draws at a time

Item = tuple[str, int]  # split and index of an image


def write_dataset(
    root: Path, options: SceneOptions, *, overwrite: bool = False, workers: int | None = None
) -> dict[str, Any]:
    """Write all splits in VOC layout below ``root``, or do nothing where they already are.

    An interrupted run continues. Files appear under their names only when they are complete.

    Args:
        overwrite: replace a set that was generated with other options.
        workers: processes that draw; None: one per core, at most 8.

    Returns:
        The content of ``root/meta.json``: format, options, context probabilities, fingerprint.

    Raises:
        FileExistsError: ``root`` holds a set of other options, or files that are no generated set.
    """
    head = {"format": FORMAT, "options": json.loads(json.dumps(asdict(options)))}
    found = read_meta(root)
    if found is None and any((root / folder).exists() for folder in (IMAGES, MASKS, LISTS)):
        raise FileExistsError(f"{root} holds another data set (no meta.json): choose another folder")
    if found is not None and (changed := differences({key: found.get(key, {}) for key in head}, head)):
        if not overwrite:
            raise FileExistsError(
                f"{root} was generated with other options ({', '.join(changed)}): --overwrite replaces it, "
                "--out FOLDER writes elsewhere"
            )
        # In this order a crash leaves an unfinished set of the old options, never a mixture.
        write_json(root / "meta.json", {key: found[key] for key in head if key in found})
        for folder in (MASKS, IMAGES, LISTS):
            shutil.rmtree(root / folder, ignore_errors=True)
    elif found is not None and found.get("fingerprint"):
        return found
    write_json(root / "meta.json", head)  # before any image, so that an interrupted run is recognised as ours

    images = [(split, index) for split in SPLITS for index in range(options.count(split))]
    missing = [item for item in images if not _mask_path(root, image_name(*item)).exists()]
    parts = [missing[start : start + CHUNK] for start in range(0, len(missing), CHUNK)]
    with progress_bar(total=len(images), desc=f"scenes in {root}", unit="image") as bar:
        bar.update(len(images) - len(missing))
        for written in _write_parts(root, options, parts, workers):
            bar.update(written)

    class_names = ("background", *options.classes)
    tags, digest = {}, hashlib.sha256()
    for name in (image_name(*item) for item in images):
        tags[name] = [class_names[k] for k in np.unique(read_mask(_mask_path(root, name))) if k]
        digest.update(name.encode())
        for path in (_image_path(root, name), _mask_path(root, name)):
            digest.update(path.read_bytes())
    write_tags(root / "tags.csv", tags)
    for split in SPLITS:
        lines = "".join(f"{image_name(split, index)}\n" for index in range(options.count(split)))
        write_atomic(root / LISTS / "Segmentation" / f"{split}.txt", lines.encode())
    write_atomic(root / "class_names.txt", "".join(f"{name}\n" for name in class_names).encode())
    table = {
        name: {context: round(float(share), 4) for context, share in zip(CONTEXTS, row, strict=True)}
        for name, row in zip(options.classes, context_given_class(options), strict=True)
    }
    meta = {**head, "context_given_class": table, "fingerprint": digest.hexdigest()[:16]}
    write_json(root / "meta.json", meta)
    return meta


def read_meta(root: Path) -> dict[str, Any] | None:
    """``meta.json`` of a generated set (without fingerprint: not finished); None where there is none."""
    path = root / "meta.json"
    if not path.is_file():
        return None
    meta = read_json(path)
    if not isinstance(meta, dict) or not str(meta.get("format", "")).startswith("tag2mask/synthetic"):
        raise FileExistsError(f"{path} does not belong to a generated data set: choose another folder")
    return meta


def image_name(split: str, index: int) -> str:
    """Name of an image: the folders of VOC are shared by all splits."""
    return f"{split}_{index:05d}"


def _image_path(root: Path, name: str) -> Path:
    return root / IMAGES / f"{name}.jpg"


def _mask_path(root: Path, name: str) -> Path:
    return root / MASKS / f"{name}.png"


def _write_parts(
    root: Path, options: SceneOptions, parts: Sequence[list[Item]], workers: int | None
) -> Iterator[int]:
    workers = min(os.cpu_count() or 1, 8) if workers is None else workers
    if workers <= 1 or len(parts) <= 1:
        yield from map(_write_images, repeat(root), repeat(options), parts)
        return
    # spawn: the caller may already run threads, which a forked process would inherit in an undefined state.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, initializer=start_worker) as pool:
        yield from pool.map(_write_images, repeat(root), repeat(options), parts)


def _write_images(root: Path, options: SceneOptions, images: Sequence[Item]) -> int:
    """Write some images; the mask comes last and says that its image is complete."""
    for split, index in images:
        scene, name = render_scene(options, split, index), image_name(split, index)
        buffer = io.BytesIO()
        # Without chroma subsampling: at this size a block of 16 x 16 pixels is as large as a wheel.
        Image.fromarray(scene.image).save(buffer, "JPEG", quality=95, subsampling=0)
        write_atomic(_image_path(root, name), buffer.getvalue())
        write_mask(_mask_path(root, name), scene.mask)
    return len(images)
