"""Scores of labels and predictions: counted, printed, written to ``scores.json``."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from datasets.base import Record, Split
from engine.evaluator import confusion_table, pair_table, provenance, score_record, score_table
from engine.inference import LoadedMethod
from engine.outputs import short_name
from engine.scores.confusion import ConfusionMatrix
from engine.scores.records import write_scores
from utils.distributed import is_main
from utils.image import IGNORE_INDEX, read_mask


def score_source(options: argparse.Namespace, loaded: LoadedMethod, split: Split) -> dict[str, Any]:
    """Where a score comes from: the data, the checkpoint and the precision."""
    return {**provenance(loaded.cfg, split), **loaded.provenance(), "precision": options.precision}


def has_mask(record: Record) -> bool:
    """Whether the ground truth of an image is there."""
    return record.mask is not None and record.mask.is_file()


def count_pixels(
    matrix: ConfusionMatrix, record: Record, prediction: np.ndarray, ignored: str = "error"
) -> None:
    """Add one image to a confusion matrix; an image without mask is passed over.

    Args:
        prediction: (H, W) class ids.
        ignored: what 255 in the prediction is: ``error``, ``background``, or ``skip`` (the pixel does not
            count).
    """
    if not has_mask(record):
        return
    assert record.mask is not None
    truth = read_mask(record.mask)
    if truth.shape != prediction.shape:
        raise ValueError(
            f"mask {record.mask} is {truth.shape}, the prediction of '{record.name}' {prediction.shape} "
            "(rows, columns)"
        )
    if ignored == "background":
        prediction = np.where(prediction == IGNORE_INDEX, 0, prediction)
    elif ignored == "skip":
        kept = prediction != IGNORE_INDEX
        truth, prediction = truth[kept], prediction[kept]
    matrix.update(torch.from_numpy(truth), torch.from_numpy(prediction))


def scored_images(split: Split, matrix: ConfusionMatrix) -> int:
    """Number of images that a score of a split rests on; says so where these are not all of them, or none.

    Args:
        matrix: what was counted.
    """
    scored = [record for record in split.records if has_mask(record)]
    if not scored:
        print(f"no masks for {short_name(split)}: nothing to score")
    elif matrix.lacks_classes and any(record.tags != () for record in scored):  # () shows no object at all
        print(
            f"no mask of {short_name(split)} holds any of the classes; {IGNORE_INDEX} means ignored, class 1 "
            "must be 1: nothing to score"
        )
        return 0
    elif len(scored) < len(split):
        print(f"only {len(scored)} of {len(split)} images have a mask: the score is theirs")
    return len(scored)


def report_labels(
    folder: Path,
    matrix: ConfusionMatrix,
    split: Split,
    protocol: str,
    settings: Mapping[str, Any],
    source: Mapping[str, Any],
) -> None:
    """Print the tables and add the score of a split's labels to ``scores.json``; main process only.

    Args:
        matrix: the counts, summed over the processes that shared the images out.
    """
    scores = matrix.scores()
    if not is_main():
        return
    scored = scored_images(split, matrix)
    if not scored:
        return
    print(score_table({"seg": scores}, split.class_names))
    print(confusion_table({"seg": scores}, split.class_names))
    print(pair_table(scores, split.class_names))
    source = {**source, "scored_images": scored}
    report(folder, [score_record(protocol, scores, split.class_names, settings, source)])


def report(folder: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """Print one line per score and add them to ``scores.json``; main process only."""
    if not is_main():
        return
    for record in records:
        score = record["score"]
        miou = "-" if score["miou"] is None else f"{100 * score['miou']:.2f}"
        ratio = "-" if score["mean_confusion"] is None else f"{score['mean_confusion']:.2f}"
        print(
            f"{record['protocol']:<40} mIoU {miou:>6}   FP/TP {ratio:>6} (mean of "
            f"{score['confusion_classes']} classes)"
        )
    write_scores(folder, records)
    print(f"scores   {folder / 'scores.json'}")
