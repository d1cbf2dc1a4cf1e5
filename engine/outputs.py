"""What the tools over images share: which images, and the folder for what they make."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from datasets.agreement import compare_masks_with_tags
from datasets.base import Record, Sample, Split, WeakSegDataset
from datasets.pictures import IMAGE_SUFFIXES
from engine.config.common import CheckpointOptions, ImageOptions
from engine.data import load_split, reading_of
from engine.inference import LoadedMethod, for_each_image, image_split, is_photo, load_method
from engine.scores.base import predicted_file
from engine.scores.evaluation import Evaluation
from engine.scores.records import provenance, short_name
from utils.distributed import barrier, init_process_group, is_main
from utils.files import claim_folder


def load_inputs(options: CheckpointOptions) -> tuple[torch.device, LoadedMethod, Split]:
    """The device of this process, the checkpoint and the images of a tool."""
    device = init_process_group(options.device)
    loaded = load_method(options.model_path, device, options.changes())
    return device, loaded, find_split(loaded, options.infer)


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
            print(f"photos   subfolders of {infer} are skipped")
        return image_split(infer, loaded.class_names, reading_of(loaded.cfg.data))
    name = infer or loaded.cfg.data.val_set
    if not name:
        raise ValueError("the checkpoint's config has no data.val_set: name the images with --infer")
    try:
        split = load_split(loaded.cfg.data, name)
    except (FileNotFoundError, ValueError) as error:
        if infer is None or infer.endswith(".txt"):
            raise
        kind = FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError
        raise kind(f"'{infer}' is neither a photo nor a folder of photos, and as a split: {error}") from error
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


class Outputs:
    """A file for each image of a split, made with a checkpoint, and the scores of those with a mask.

    Args:
        protocol: id of the scores.
        path_of: where the file of an image is, `label_path` or `cam_path`.
        settings: what decides the files, beside checkpoint, images and precision.

    Raises:
        ValueError: the folder holds files made with other settings, or masks and tags disagree.
    """

    def __init__(
        self,
        options: ImageOptions,
        loaded: LoadedMethod,
        split: Split,
        protocol: str,
        path_of: Callable[[Path, str], Path],
        device: torch.device,
        **settings: Any,
    ) -> None:
        self.options, self.loaded, self.split, self.protocol = options, loaded, split, protocol
        self.path_of, self.device = path_of, device
        self.evaluation = Evaluation(
            split, loaded.cfg.eval.scores, loaded.method.background_threshold, device=device
        )
        # Of photos alone some may come or go: each result has the date of its photo instead.
        self.is_bare = all(record.tags is None and record.mask is None for record in split.records)
        self.settings = {
            "protocol": protocol,
            "checkpoint_sha256": loaded.sha256,
            "split": short_name(split),
            "data_fingerprint": None if self.is_bare else split.fingerprint(),
            "precision": options.precision,
            "overrides": sorted(item for item in options.overrides if item.startswith("method.")),
            **settings,
        }
        name = re.sub("[^A-Za-z0-9.+-]+", "_", protocol).strip("_")[:100]
        self.folder = options.out or loaded.path.parent / f"{loaded.path.stem}_{name}"
        compare_masks_with_tags(split, may_lack_classes=True)
        if is_main():
            print(loaded.describe())
            claim_folder(self.folder, self.settings)
            print(f"output   {self.folder}   ({len(split)} images, protocol {protocol})")
        barrier()

    def path(self, record: Record) -> Path:
        """The file of an image."""
        return self.path_of(self.folder, record.name)

    def make(
        self,
        work: Callable[[Sample, Record], None],
        text: str,
        others: Callable[[Record], Path] | None = None,
    ) -> None:
        """Call ``work`` for every image without a file; ``others`` is a second file that it makes.

        It writes the file and calls `finish`.
        """

        def finished(record: Record) -> bool:
            is_there = is_up_to_date(self.path(record), record, self.is_bare)
            return is_there and (others is None or others(record).is_file())

        for_each_image(
            WeakSegDataset(self.split),
            lambda sample: work(sample, self.split.records[int(sample["index"])]),
            text=text,
            num_workers=self.options.num_workers,
            finished=finished,
            revisit=self.score,
        )

    def finish(self, record: Record) -> None:
        """The file of an image is written."""
        if self.is_bare:
            date = record.image.stat().st_mtime_ns
            os.utime(self.path(record), ns=(date, date))
        self.score(record)

    def score(self, record: Record) -> None:
        """Add a file to the scores."""
        path, threshold = self.path(record), self.loaded.method.background_threshold
        self.evaluation.add(record, predicted_file(path, threshold, self.device))

    def report(self) -> Path:
        """Print the scores and add them to ``scores.json``; returns the folder."""
        source = {**provenance(self.loaded.cfg, self.split), **self.loaded.provenance()}
        source["precision"] = self.options.precision
        self.evaluation.reduce().report(self.folder, self.protocol, self.settings, source)
        return self.folder


def is_up_to_date(path: Path, record: Record, is_bare: bool) -> bool:
    """Whether the file of an image is there and, of photos alone, was made from this very photo.

    It has the photo's date. One that took the place of a photo of the same date has a later change time.
    """
    if not path.is_file() or not is_bare:
        return path.is_file()
    made, photo = path.stat(), record.image.stat()
    return made.st_mtime_ns == photo.st_mtime_ns and made.st_ctime_ns >= photo.st_ctime_ns
