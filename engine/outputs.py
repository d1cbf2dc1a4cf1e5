"""What the tools over images share: which images, and the folder for what they make."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from datasets.agreement import compare_masks_with_tags
from datasets.base import Record, Sample, Split, WeakSegDataset
from engine.config.common import CheckpointOptions, ImageOptions
from engine.data import load_split, reading_of
from engine.inference import LoadedMethod, for_each_image, image_split, is_photo, load_method
from engine.scores.base import predicted_file
from engine.scores.evaluation import Evaluation
from engine.scores.records import provenance, short_name
from utils.distributed import barrier, init_process_group, is_main
from utils.files import claim_folder, has_date, keep_date
from utils.logging import LOGGER


def load_inputs(options: CheckpointOptions) -> tuple[torch.device, LoadedMethod, Split]:
    """The device of this process, the checkpoint and the images of a tool."""
    device = init_process_group(options.device)
    loaded = load_method(options.model_path, device, options.changes())
    return device, loaded, find_split(loaded, options.infer)


def find_split(loaded: LoadedMethod, infer: str | None) -> Split:
    """The images that ``--infer`` names: a split, a list file, a photo or a folder of photos; default: the
    config's val_set, or where there is none its train_set.

    Raises:
        ValueError: the data set has other classes than the checkpoint, or the name means two things.
    """
    if infer is not None and is_photo(infer):
        if Path(infer).name == infer and Path(infer).is_dir() and _is_split(loaded, infer):
            raise ValueError(f"'{infer}' is a split and a folder: write ./{infer} for the folder")
        return image_split(infer, loaded.class_names, reading_of(loaded.cfg.data))
    name = infer or loaded.cfg.data.val_set or loaded.cfg.data.train_set
    if not infer and not loaded.cfg.data.val_set:
        LOGGER.warning(f"no data.val_set: the images are those of data.train_set, '{name}'")
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
            f"the checkpoint has classes {ours}, the data set {theirs}: choose data of the same classes"
        )
    return split


def _is_split(loaded: LoadedMethod, name: str) -> bool:
    try:
        load_split(loaded.cfg.data, name)
    except (FileNotFoundError, ValueError):
        return False
    return True


class Outputs:
    """A file for each image of a split, and the scores of those with a mask.

    Args:
        protocol: id of the scores.
        path_of: where the file of an image is, `label_path` or `cam_path`.
        settings: what decides the files.
        source: what the scores rest on (`provenance`).
        reads: the file of an earlier step that an image's file is made from, beside the image.
        ignored: what 255 in a label counts as (`Evaluation.add`).

    Raises:
        ValueError: the folder holds files made with other settings, or masks and tags disagree.
    """

    def __init__(
        self,
        folder: Path,
        split: Split,
        protocol: str,
        path_of: Callable[[Path, str], Path],
        evaluation: Evaluation,
        *,
        settings: Mapping[str, Any],
        source: Mapping[str, Any],
        num_workers: int,
        reads: Callable[[Record], Path] | None = None,
        ignored: str = "error",
    ) -> None:
        self.folder, self.split, self.protocol, self.path_of = folder, split, protocol, path_of
        self.evaluation, self.source = evaluation, source
        self.num_workers, self.reads, self.ignored = num_workers, reads, ignored
        # Of photos alone some may come or go: each result has the date of its photo instead.
        self.is_bare = all(record.tags is None and record.mask is None for record in split.records)
        data = {"split": short_name(split), "data_fingerprint": None if self.is_bare else split.fingerprint()}
        self.settings = {"protocol": protocol, **data, **settings}
        compare_masks_with_tags(split, may_lack_classes=True)
        if is_main():
            claim_folder(folder, self.settings)
            print(f"output   {folder}   ({len(split)} images, protocol {protocol})")
        barrier()

    @classmethod
    def of_checkpoint(
        cls,
        options: ImageOptions,
        loaded: LoadedMethod,
        split: Split,
        protocol: str,
        path_of: Callable[[Path, str], Path],
        device: torch.device,
        reads: Callable[[Record], Path] | None = None,
        **settings: Any,
    ) -> Outputs:
        """What a checkpoint makes; ``settings`` decide the files, beside checkpoint, images and precision."""
        if is_main():
            print(loaded.describe())
        name = re.sub("[^A-Za-z0-9.+-]+", "_", protocol).strip("_")[:100]
        precision = {"precision": options.precision}
        settings = {
            "checkpoint_sha256": loaded.sha256,
            "overrides": sorted(item for item in options.overrides if item.startswith("method.")),
            **precision,
            **settings,
        }
        return cls(
            options.out or loaded.path.parent / f"{loaded.path.stem}_{name}",
            split,
            protocol,
            path_of,
            Evaluation(split, loaded.cfg.eval.scores, loaded.method.background_threshold, device=device),
            settings=settings,
            source={**provenance(loaded.cfg, split), **loaded.provenance(), **precision},
            num_workers=options.num_workers,
            reads=reads,
        )

    def path(self, record: Record) -> Path:
        """The file of an image."""
        return self.path_of(self.folder, record.name)

    def make(self, work: Callable[[Sample, Record], None], text: str) -> None:
        """Call ``work`` for every image without a file; it writes the file and calls `finish`."""

        def finished(record: Record) -> bool:
            path, sources = self.path(record), self.sources(record)
            return has_date(path, *sources) if sources else path.is_file()

        for_each_image(
            WeakSegDataset(self.split),
            lambda sample: work(sample, self.split.records[int(sample["index"])]),
            text=text,
            num_workers=self.num_workers,
            finished=finished,
            revisit=self.score,
        )

    def finish(self, record: Record, _: None = None) -> None:
        """The file of an image is written; a pool calls it with the result of what wrote it."""
        if sources := self.sources(record):
            keep_date(self.path(record), *sources)
        self.score(record)

    def sources(self, record: Record) -> list[Path]:
        """The files whose dates tell whether the file of an image is still theirs."""
        return [*([record.image] if self.is_bare else []), *([self.reads(record)] if self.reads else [])]

    def score(self, record: Record) -> None:
        """Add a file to the scores."""
        prediction = predicted_file(self.path(record), self.evaluation.threshold, self.evaluation.device)
        self.evaluation.add(record, prediction, self.ignored)

    def report(self) -> Path:
        """Print the scores and add them to ``scores.json``; returns the folder."""
        self.evaluation.reduce().report(self.folder, self.protocol, self.settings, self.source)
        return self.folder
