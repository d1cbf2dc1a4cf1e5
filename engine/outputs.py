"""What the tools over images share: which images, and the folder for what they make."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from datasets.agreement import compare_masks_with_tags
from datasets.base import Record, Split
from datasets.lists import IMAGE_SUFFIXES
from engine.config.common import ImageOptions
from engine.data import load_split
from engine.inference import LoadedMethod, image_split, is_photo
from engine.scores.records import provenance, short_name
from utils.distributed import barrier, is_main
from utils.files import claim_folder


def find_split(loaded: LoadedMethod, infer: str | None) -> Split:
    """The images that ``--infer`` names: a split, a list file, a photo or a folder of photos; default: the
    config's val_set.

    Raises:
        ValueError: the data set has other classes than the checkpoint, or the name means two things.
    """
    if infer is not None and is_photo(infer):
        if Path(infer).name == infer and Path(infer).is_dir() and _is_split(loaded, infer):
            raise ValueError(
                f"'{infer}' is a split of the data set and a folder in the working directory: write "
                f"./{infer} for the folder, or start from another directory for the split"
            )
        below = (path.suffix.lower() for path in Path(infer).expanduser().glob("*/*"))
        if is_main() and any(suffix in IMAGE_SUFFIXES for suffix in below):
            print(f"photos   those in subfolders of {infer} are left out; name a subfolder for its own")
        return image_split(infer, loaded.class_names)
    name = infer or loaded.cfg.data.val_set
    if not name:
        raise ValueError(
            "the checkpoint's config names no data.val_set: say with --infer which images to work on"
        )
    try:
        split = load_split(loaded.cfg.data, name)
    except (FileNotFoundError, ValueError) as error:
        if infer is None or infer.endswith(".txt"):
            raise
        kind = FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError
        raise kind(f"'{infer}' is no photo and no folder of photos, and as a split: {error}") from error
    if split.class_names != loaded.class_names:
        both = (loaded.class_names, split.class_names)
        ours, theirs = (f"{len(names)} ({', '.join(names[:4])}, ...)" for names in both)
        raise ValueError(
            f"the checkpoint has classes {ours}, the data set {theirs}: set data.source, data.root and "
            "data.options to a data set with the checkpoint's classes"
        )
    return split


def _is_split(loaded: LoadedMethod, name: str) -> bool:
    try:
        load_split(loaded.cfg.data, name)
    except (FileNotFoundError, ValueError):
        return False
    return True


def output_folder(out: Path | None, loaded: LoadedMethod, protocol: str) -> Path:
    """``--out``, or a folder beside the checkpoint, named after checkpoint and protocol."""
    if out:
        return out
    return (
        loaded.path.parent
        / f"{loaded.path.stem}_{re.sub('[^A-Za-z0-9.+-]+', '_', protocol).strip('_')[:100]}"
    )


def claim_output(
    options: ImageOptions, loaded: LoadedMethod, split: Split, protocol: str, **settings: Any
) -> tuple[Path, dict[str, Any]]:
    """The output folder of a tool, claimed for its settings (all processes agree), and these settings.

    Args:
        options: the command line of the tool.
        settings: of this tool, beside checkpoint, images and precision.

    Raises:
        ValueError: the folder holds files made with other settings, or masks and tags disagree.
    """
    settings = {
        "protocol": protocol,
        "checkpoint_sha256": loaded.sha256,
        "split": short_name(split),
        # Photos that nothing is known of do not count together: some may come or go.
        "data_fingerprint": None if is_bare(split) else split.fingerprint(),
        "precision": options.precision,
        "overrides": sorted(item for item in options.overrides if item.startswith("method.")),
        **settings,
    }
    out = output_folder(options.out, loaded, protocol)
    compare_masks_with_tags(split, may_lack_classes=True)
    if is_main():
        print(loaded.describe())
        claim_folder(out, settings)
        print(f"output   {out}   ({len(split)} images, protocol {protocol})")
    barrier()
    return out, settings


def is_bare(split: Split) -> bool:
    """Whether a split is photos alone, without tags or masks."""
    return all(record.tags is None and record.mask is None for record in split.records)


def is_up_to_date(path: Path, record: Record, bare: bool) -> bool:
    """Whether the result of an image is there and, of a split that `is_bare`, `date_after` this photo."""
    return path.is_file() and (not bare or path.stat().st_mtime_ns == record.image.stat().st_mtime_ns)


def date_after(path: Path, record: Record, bare: bool) -> None:
    """Give a result the date of its photo: another photo of that name, older or newer, has another date.

    A data set's photos keep no such date, because the fingerprint in ``settings.json`` tells them.
    """
    if bare:
        date = record.image.stat().st_mtime_ns
        os.utime(path, ns=(date, date))


def score_source(options: ImageOptions, loaded: LoadedMethod, split: Split) -> dict[str, Any]:
    """Where a score comes from: the data, the checkpoint and the precision."""
    return {**provenance(loaded.cfg, split), **loaded.provenance(), "precision": options.precision}
