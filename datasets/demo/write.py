"""Write the generated scenes of the demo as a data set in VOC layout."""

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from datasets.demo.scene import SPLITS, SceneOptions, render_scene
from datasets.tags import write_tags
from utils.files import atomic_file, read_json, write_atomic, write_json
from utils.image import read_mask, write_mask
from utils.logging import progress_bar
from utils.mappings import differences
from utils.pool import WorkerPool, core_count

FORMAT = "tag2mask/synthetic-2"  # a change of what is drawn for the same options needs a new number
IMAGES, MASKS, CONTEXT_MAPS, LISTS = "JPEGImages", "SegmentationClass", "Contexts", "ImageSets"
FEW = 50  # images for which no processes are started


def write_dataset(root: Path, options: SceneOptions, *, workers: int | None = None) -> dict[str, Any]:
    """Write all splits in VOC layout below ``root``, or what is missing of them.

    Args:
        workers: processes that draw; None: one per core, at most 8.

    Returns:
        The content of ``root/meta.json``: format, options, fingerprint.

    Raises:
        FileExistsError: ``root`` holds a set of other options, or files that are no generated set.
    """
    head = {"format": FORMAT, "options": json.loads(json.dumps(asdict(options)))}
    found = read_meta(root)
    if found is None and any((root / folder).exists() for folder in (IMAGES, MASKS, LISTS)):
        raise FileExistsError(f"{root} holds another data set (no meta.json): choose another folder")
    if found is not None and (changed := differences({key: found.get(key, {}) for key in head}, head)):
        raise FileExistsError(f"{root} has other options ({', '.join(changed)}): delete it, or change --out")
    if found is not None and found.get("fingerprint"):
        return found
    write_json(root / "meta.json", head)  # before any image, so that an interrupted run is recognised as ours

    names = {split: [f"{split}_{index:05d}" for index in range(options.count(split))] for split in SPLITS}
    images = [(name, split, index) for split in SPLITS for index, name in enumerate(names[split])]
    missing = [item for item in images if not _mask_path(root, item[0]).exists()]
    workers = min(core_count(), 8) if workers is None else workers
    with (
        progress_bar(total=len(images), desc=f"scenes in {root}", unit="image") as bar,
        WorkerPool(workers if workers > 1 and len(missing) > FEW else 0) as pool,
    ):
        bar.update(len(images) - len(missing))
        for item in missing:
            pool.submit(_write_image, root, options, *item, then=lambda _: bar.update())

    class_names = ("background", *options.classes)
    tags, digest = {}, hashlib.sha256()
    for name, *_ in images:
        tags[name] = [class_names[k] for k in np.unique(read_mask(_mask_path(root, name))) if k]
        digest.update(name.encode())
        for path in (_image_path(root, name), _mask_path(root, name)):
            digest.update(path.read_bytes())
    write_tags(root / "tags.csv", tags)
    texts = {f"{LISTS}/Segmentation/{split}.txt": names[split] for split in SPLITS}
    for file, lines in {**texts, "class_names.txt": class_names}.items():
        write_atomic(root / file, "".join(f"{line}\n" for line in lines).encode())
    meta = {**head, "fingerprint": digest.hexdigest()[:16]}
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


def _image_path(root: Path, name: str) -> Path:
    return root / IMAGES / f"{name}.jpg"


def _mask_path(root: Path, name: str) -> Path:
    return root / MASKS / f"{name}.png"


def _write_image(root: Path, options: SceneOptions, name: str, split: str, index: int) -> None:
    """Write an image; its mask comes last and says that it is complete."""
    scene = render_scene(options, split, index)
    with atomic_file(_image_path(root, name)) as file:
        # Without chroma subsampling: at this size a block of 16 x 16 pixels is as large as a wheel.
        Image.fromarray(scene.image).save(file, "JPEG", quality=95, subsampling=0)
    write_mask(root / CONTEXT_MAPS / f"{name}.png", scene.context_map)
    write_mask(_mask_path(root, name), scene.mask)
