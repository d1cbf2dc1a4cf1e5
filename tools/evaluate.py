"""Score a folder of label images, or of CAM files over thresholds, against the ground truth of a split.

python tools/evaluate.py --labels out/ config=configs/toco/voc.yaml --split val
python tools/evaluate.py --cam logs/my_run/cam --model_path logs/my_run/last.pth --split train
"""

import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from engine.config.common import DataOptions
from engine.config.options import command_line, option


@dataclass(kw_only=True)
class Options(DataOptions):
    labels: Path | None = option(None, "folder of label images <name>.png", reads=True)
    cam: Path | None = option(None, "folder of CAM files <name>.npz (tools/infer_cam.py)", reads=True)
    split: str | None = option(None, "split or list file (.txt); default: data.val_set", reads="images")
    threshold: float | None = option(
        None, "background threshold of CAMs; default: method.background_threshold, else 0.5"
    )
    ignored: str = option("error", "255 in a prediction", choices=("error", "background", "skip"))
    protocol: str | None = option(None, "protocol id of the score; default: that of the folder")
    out: Path | None = option(None, "folder of scores.json; default: the scored folder")

    def __post_init__(self) -> None:
        if bool(self.labels) == bool(self.cam):
            raise ValueError("name what to score: either --labels FOLDER or --cam FOLDER")


def run(options: Options) -> Path:
    """Score a folder; returns where ``scores.json`` lies."""
    from datasets.agreement import compare_masks_with_tags
    from engine.data import data_config, load_split
    from engine.scores.base import predicted_file
    from engine.scores.evaluation import Evaluation, truth_path
    from engine.scores.records import provenance, short_name
    from utils.cam_files import cam_path, label_path
    from utils.files import made_with
    from utils.logging import progress_bar

    folder = options.labels or options.cam
    assert folder is not None
    if not folder.is_dir():
        raise FileNotFoundError(f"folder {folder} does not exist")
    config = data_config(options)
    name = options.split or config.data.val_set
    if not name:
        raise ValueError("the config has no data.val_set: name the images with --split")
    split = load_split(config.data, name)
    records = [record for record in split.records if truth_path(record)]
    if not records:
        raise ValueError(f"split '{split.name}' has no masks to score against: set data.options.masks")
    masked = replace(split, records=tuple(records))
    compare_masks_with_tags(masked, may_lack_classes=True)
    path_of = label_path if options.labels else cam_path
    masked.require(folder, path_of, "the inference")
    threshold = config.get("method", {}).get("background_threshold", 0.5)
    threshold = float(threshold if options.threshold is None else options.threshold)
    evaluation = Evaluation(split, config.eval.scores, threshold)
    for record in progress_bar(records, desc="score", unit="img", leave=False):
        path = path_of(folder, record.name)
        prediction = predicted_file(path, threshold)
        try:
            evaluation.add(record, prediction, options.ignored)
        except ValueError as error:
            is_pseudo = (
                options.labels and options.ignored == "error" and (prediction.labels["seg"] == 255).any()
            )
            advice = "; labels with ignored pixels need --ignored background or skip" if is_pseudo else ""
            raise ValueError(f"{path}: {error}{advice}") from error
    origin = made_with(folder)
    protocol = options.protocol or _protocol(origin, "labels" if options.labels else "cam", short_name(split))
    settings = {"folder": str(folder.absolute()), "made_with": origin}
    settings |= {"ignored": options.ignored} if options.labels else {}
    # Of which run a folder is, a data set's config does not know; `made_with` has the checkpoint's hash.
    source = provenance(config if options.model_path else None, split)
    out = options.out or folder
    evaluation.report(out, protocol, settings, source)
    return out


def _protocol(origin: Mapping[str, Any], kind: str, split: str) -> str:
    """The id that inference gave the folder, with the scored split; ``labels/<split>`` for other folders."""
    if "protocol" not in origin:
        return f"{kind}/{split}"
    kind, _, rest = origin["protocol"].split("/", 2)
    return f"{kind}/{split}/{rest}"


if __name__ == "__main__":
    command_line(Options, run, __doc__)
