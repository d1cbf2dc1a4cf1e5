"""What the command lines of the inference and evaluation tools share."""

from __future__ import annotations

import argparse
import difflib
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from datasets.base import Record, Split
from engine.data import load_split
from engine.evaluator import confusion_table, pair_table, score_record, score_table
from engine.inference import LoadedMethod, image_split, is_photo
from utils.artifacts import write_scores
from utils.distributed import is_main
from utils.image import read_mask
from utils.metrics import IGNORE_INDEX, ConfusionMatrix

OVERRIDE = re.compile(r"^[A-Za-z_][\w.]*=")


def checkpoint_parser(description: str | None) -> argparse.ArgumentParser:
    """A parser with what every tool takes that runs a checkpoint over images."""
    p = argparse.ArgumentParser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="further arguments: key=value changes of the checkpoint's config",
    )
    p.add_argument(
        "--model_path",
        required=True,
        help="checkpoint (.pth, .safetensors), also of a published program (docs/evaluation.md)",
    )
    p.add_argument(
        "--infer",
        "--infer_set",
        dest="infer",
        help="split, list file (.txt), photo, or folder of photos; default: data.val_set",
    )
    p.add_argument("--data_root", help="folder of the data set; default: that of the checkpoint's config")
    return p


def parse(parser: argparse.ArgumentParser, arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Flags and ``key=value`` overrides in any order, as a mapping; the latter under ``overrides``."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    overrides = [item for item in arguments if OVERRIDE.match(item)]
    flags = [item for item in arguments if not OVERRIDE.match(item)]
    return {**vars(parser.parse_args(flags)), "overrides": overrides}


def complete(parser: argparse.ArgumentParser, cfg: Mapping[str, Any]) -> argparse.Namespace:
    """The options of a stage: those given, the parser's defaults for the rest.

    Raises:
        KeyError: an option that the tool does not have, with the closest one.
        ValueError: a required option is left out.
    """
    actions = [action for action in parser._actions if action.dest != "help"]
    options = {action.dest: action.default for action in actions} | {"overrides": []}
    for key, value in cfg.items():
        if key not in options:
            close = difflib.get_close_matches(key, options, n=1)
            raise KeyError(
                f"'{key}' is not an option of {parser.prog}"
                + (f": did you mean '{close[0]}'?" if close else "")
            )
        options[key] = value
    for action in actions:
        if action.required and options[action.dest] is None:
            raise ValueError(f"{parser.prog} needs {'/'.join(action.option_strings)}")
    return argparse.Namespace(**options)


def data_overrides(options: argparse.Namespace) -> list[str]:
    """The overrides of the command line, ``--data_root`` (relative to the working directory) among them."""
    root = [f"data.root={Path(options.data_root).expanduser().absolute()}"] if options.data_root else []
    return [*root, *options.overrides]


def find_split(loaded: LoadedMethod, infer: str | None) -> Split:
    """The images that ``--infer`` names: a split, a list file, a photo or a folder of photos; default: the
    config's val_set.

    Raises:
        ValueError: the data set has other classes than the checkpoint.
    """
    if infer is not None and is_photo(infer):
        return image_split(infer, loaded.class_names)
    name = infer or loaded.cfg.data.val_set
    if not name:
        raise ValueError(
            "the checkpoint's config names no data.val_set: say with --infer which images to work on"
        )
    split = load_split(loaded.cfg.data, name)
    if split.class_names != loaded.class_names:
        both = (loaded.class_names, split.class_names)
        ours, theirs = (f"{len(names)} ({', '.join(names[:4])}, ...)" for names in both)
        raise ValueError(
            f"the checkpoint has classes {ours}, the data set {theirs}: set data.source, data.root and "
            "data.options to a data set with the checkpoint's classes"
        )
    return split


def short_name(split: Split) -> str:
    """The split's name in protocol ids and folder names; of a list file its stem."""
    return Path(split.name).stem if split.name.endswith(".txt") else split.name


def output_folder(out: str | None, loaded: LoadedMethod, protocol: str) -> Path:
    """``--out``, or a folder beside the checkpoint, named after checkpoint and protocol."""
    if out:
        return Path(out).expanduser()
    return (
        loaded.path.parent
        / f"{loaded.path.stem}_{re.sub('[^A-Za-z0-9.+-]+', '_', protocol).strip('_')[:100]}"
    )


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
        truth = np.where(prediction == IGNORE_INDEX, IGNORE_INDEX, truth)
    matrix.update(torch.from_numpy(truth), torch.from_numpy(prediction))


def report_labels(
    folder: Path,
    matrix: ConfusionMatrix,
    split: Split,
    protocol: str,
    settings: Mapping[str, Any],
    source: Mapping[str, Any],
) -> None:
    """Sum label counts over processes, print the tables and add the score of a split to ``scores.json``."""
    scores = matrix.reduce().scores()
    if not is_main():
        return
    scored = sum(has_mask(record) for record in split.records)
    if not scored:
        print(f"no masks for {short_name(split)}: nothing to score; the label images are in {folder}")
        return
    if scored < len(split):
        print(f"only {scored} of {len(split)} images have a mask: the score is theirs")
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
