"""What the command lines of the inference and evaluation tools share."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from datasets.base import Record, Split
from datasets.lists import IMAGE_SUFFIXES
from engine.config.load import OVERRIDE
from engine.data import load_split
from engine.evaluator import confusion_table, pair_table, provenance, score_record, score_table
from engine.inference import LoadedMethod, image_split, is_photo
from engine.scores.confusion import ConfusionMatrix
from engine.scores.records import write_scores
from utils.build import suggest
from utils.cli import count
from utils.distributed import barrier, is_main
from utils.files import claim_folder
from utils.image import IGNORE_INDEX, read_mask


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


def output_flags(p: argparse.ArgumentParser) -> None:
    """Add what every tool takes that writes a file for each image of a split."""
    p.add_argument(
        "--out",
        help="output folder; default: beside the checkpoint, named after checkpoint, images and protocol",
    )
    p.add_argument("--device", default="auto", help="auto, cpu or cuda")
    p.add_argument(
        "--precision",
        default="fp32",
        choices=("fp32", "bf16", "auto"),
        help="of the network (default %(default)s)",
    )
    p.add_argument(
        "--num_workers", type=count, default=2, help="processes that decode images (default %(default)s)"
    )


def parse(parser: argparse.ArgumentParser, arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Flags and ``key=value`` overrides in any order, as a mapping; the latter under ``overrides``."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    overrides = [item for item in arguments if OVERRIDE.match(item)]
    flags = [item for item in arguments if not OVERRIDE.match(item)]
    return {**vars(parser.parse_args(flags)), "overrides": overrides}


def complete(
    parser: argparse.ArgumentParser, cfg: Mapping[str, Any], tool: str | None = None
) -> argparse.Namespace:
    """The options of a stage: those given, the parser's defaults for the rest.

    Args:
        tool: what errors call the tool; None: the program that runs.

    Raises:
        KeyError: an option that the tool does not have, with the closest one.
        ValueError: a required option is left out, or has a value that its flag does not take.
    """
    parser.prog = tool or parser.prog
    actions = [action for action in parser._actions if action.dest != "help"]
    options = {action.dest: action.default for action in actions} | {"overrides": []}
    for key, value in cfg.items():
        if key not in options:
            keys = "; keys of the checkpoint's config are its overrides: [method.key=value]"
            hint = suggest(key, options) + (keys if "model_path" in options else "")
            raise KeyError(f"'{key}' is not an option of {parser.prog}{hint}")
        options[key] = value
    for action in actions:
        value = options[action.dest]
        if action.required and value is None:
            raise ValueError(f"{parser.prog} needs {'/'.join(action.option_strings)}")
        if action.dest in cfg:
            options[action.dest] = action.default if value is None else _checked(parser, action, value)
    return argparse.Namespace(**options)


def _checked(parser: argparse.ArgumentParser, action: argparse.Action, value: Any) -> Any:
    """A value of a stage as the flag would have it.

    Raises:
        ValueError: the flag takes no such value.
    """
    flag = "/".join(action.option_strings)
    if action.nargs == "?" and value is True:  # the flag alone
        return action.const
    if action.nargs == 0:
        if not isinstance(value, bool):
            raise ValueError(f"{parser.prog} {flag} is true or false, not {value!r}")
        return value
    many = isinstance(value, (list, tuple))
    if many != (action.nargs in ("+", "*") or isinstance(action.nargs, int)):
        raise ValueError(f"{parser.prog} {flag} takes {'one value' if many else 'a list'}, not {value!r}")
    if many and not value and action.nargs == "+":
        raise ValueError(f"{parser.prog} {flag} is an empty list: leave it out, or give a value")
    found = []
    for item in value if many else [value]:
        try:
            if isinstance(item, bool) or not isinstance(item, (str, int, float, Path)):
                raise TypeError("it is no text and no number")
            found.append(action.type(str(item)) if callable(action.type) else str(item))
        except (ValueError, TypeError, argparse.ArgumentTypeError) as error:
            raise ValueError(f"{parser.prog} {flag} cannot be {item!r}: {error}") from error
        if action.choices is not None and found[-1] not in action.choices:
            known = ", ".join(map(str, action.choices))
            raise ValueError(f"{parser.prog} {flag} cannot be {item!r}; known: {known}")
    return found if many else found[0]


def data_overrides(options: argparse.Namespace) -> list[str]:
    """The overrides of the command line, ``--data_root`` (relative to the working directory) among them."""
    root = [f"data.root={Path(options.data_root).expanduser().absolute()}"] if options.data_root else []
    return [*root, *options.overrides]


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


def claim_output(
    options: argparse.Namespace, loaded: LoadedMethod, split: Split, protocol: str, **settings: Any
) -> tuple[Path, dict[str, Any]]:
    """The output folder of a tool, claimed for its settings (all processes agree), and these settings.

    Args:
        options: the command line, with `output_flags`.
        settings: of this tool, beside checkpoint, images and precision.

    Raises:
        ValueError: the folder holds files made with other settings.
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
    """Whether the result of an image is there, and, of a split that `is_bare`, not older than the photo."""
    return path.is_file() and (not bare or path.stat().st_mtime_ns >= record.image.stat().st_mtime_ns)


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
