"""What a trained network loses its mIoU to: wrong tags, places, classes; sizes; calibration; worst images.

    python tools/diagnose.py logs/my_run
    python tools/diagnose.py logs/my_run --checkpoint best.pth --infer val

Every wrong pixel has one cause (engine/scores/errors.py). The table says how much the mIoU would rise if
those of one cause were right. The run folder gets diagnosis.json and diagnosis.html.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from engine.config.common import CheckpointOptions
from engine.config.options import command_line, option


@dataclass(kw_only=True)
class Options:
    run: Path = option(meaning="run folder of a training", positional=True)
    checkpoint: str = option("last.pth", "file in that folder")
    infer: str | None = option(None, "split with masks; default: data.val_set")
    worst: int = option(10, "images to name", least=0)
    device: str = option("auto", "auto, cpu or cuda")
    overrides: list[str] = option([], "changes of the checkpoint's config")


def run(options: Options) -> Path:
    """Write ``diagnosis.json`` and ``diagnosis.html`` to the run folder; returns the page."""
    from datasets.base import WeakSegDataset
    from engine.outputs import load_inputs
    from engine.report import write_page
    from engine.runs import load_run
    from engine.scores.base import plain
    from engine.validation import validate
    from utils.files import write_json

    path = options.run / options.checkpoint
    given = CheckpointOptions(
        model_path=path, infer=options.infer, device=options.device, overrides=options.overrides
    )
    device, loaded, split = load_inputs(given)
    if not any(record.mask for record in split.records):
        advice = "name a split with masks (--infer), or set data.options.masks"
        raise ValueError(
            f"'{split.name}' has no masks to compare with: {advice}. tools/visualize.py needs none: it shows "
            "CAMs, labels, and the tags that the classifier misses or makes up"
        )
    dataset, scores = WeakSegDataset(split, with_mask=True), ("miou", "errors", "calibration")
    scored = validate(loaded.method, dataset, size=loaded.cfg.eval.size, device=device, scores=scores)
    images = scored.details.content()
    ious = images["iou"].get("seg") or images["iou"]["cam"]
    ranked = sorted((i for i, iou in enumerate(ious) if iou is not None), key=lambda i: ious[i])
    worst = [
        {"name": images["names"][i], "iou": ious[i], "tags": images["tags"][i], "found": images["found"][i]}
        for i in ranked[: options.worst]
    ]
    about = {
        "checkpoint": str(path),
        "split": split.name,
        "images": int(scored.images),
        "miou": {output: plain(values.mean) for output, values in scored.results["miou"].items()},
        "errors": {output: values.more for output, values in scored.results["errors"].items()},
        "calibration": {
            output or "tags": {"error": plain(values.mean), **values.more}
            for output, values in scored.results["calibration"].items()
        },
        "worst": worst,
    }
    text = "\n\n".join([_head(about), scored.tables(), _worst(worst, split.class_names)])
    print(text)
    write_json(options.run / "diagnosis.json", about)
    charts = {"Calibration": [_calibration(*item) for item in about["calibration"].items()]}
    page = write_page([load_run(options.run)], options.run / "diagnosis.html", note=text, charts=charts)
    print(f"\n{page}")
    return page


def _head(about: dict[str, Any]) -> str:
    from engine.scores.errors import CAUSES

    lines = [f"{about['checkpoint']} on {about['images']} images of {about['split']}"]
    lines += [f"{name}: {meaning}" for name, meaning in CAUSES.items()]
    return "\n".join([*lines, "%: share of the pixels; mIoU: gain if these pixels alone were right"])


def _calibration(output: str, found: dict[str, Any]) -> Any:
    from engine.report import Chart

    points = [(score, right) for score, right, _ in found["calibration_bins"]]
    lines = [(0, "right", points), (7, "calibrated", [(0.0, 0.0), (1.0, 1.0)])]
    title = f"calibration of {output}: share that is right over the score"
    return Chart(title, lines, notes=[found["calibration_reading"]], axis="score")


def _worst(rows: list[dict[str, Any]], class_names: Sequence[str]) -> str:
    from engine.scores.tables import text_table

    cells = []
    for row in rows:
        tags, found = ([class_names[k] for k in row[key] or ()] for key in ("tags", "found"))
        shown = (", ".join(words[:9]) + (", ..." if len(words) > 9 else "") for words in (tags, found))
        cells.append([row["name"], f"{row['iou']:.1f}", *(words or "-" for words in shown)])
    return text_table(["worst images", "IoU", "tags", "found by the classifier"], cells)


if __name__ == "__main__":
    command_line(Options, run, __doc__)
