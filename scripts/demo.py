"""The whole job on generated scenes: make data, train, score on two test splits, one table and a page of
pictures.

    python scripts/demo.py                                  plain classifier, ToCo and SeCo
    python scripts/demo.py configs/toco/demo.yaml seed=1    these configs, with overrides for all of them

Everything lands in logs/demo/: report.html, table.txt, scores.json, and one run folder per method. What is
finished is not done again; an interrupted demo goes on where it stopped.
"""

from __future__ import annotations

import contextlib
import html
import io
import json
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from omegaconf import DictConfig

from datasets.base import WeakSegDataset
from engine.config.load import load_config, project_path
from engine.data import load_split
from engine.inference import load_method
from engine.pool import WorkerPool
from engine.scores.records import provenance
from engine.scores.tables import text_table
from engine.train import run as train
from engine.validation import protocols, validate
from tools import make_demo_data, visualize
from utils.cli import run_main
from utils.files import write_atomic
from utils.worker import core_count

CONFIGS = ("configs/cam/demo.yaml", "configs/toco/demo.yaml", "configs/seco/demo.yaml")
TITLES = {
    "cam": "plain classifier",
    "toco": "ToCo",
    "seco": "SeCo",
    "mcc": "MCC",
    "one_stage": "1-stage-wseg",
    "ws_fcn": "WS-FCN",
}
# Same objects and partners as in train; and the same objects on contexts that were drawn without them.
SPLITS = ("test", "test_shuffled")
FOLDER = Path("logs/demo")
SHEET_IMAGES = 12
DRAWN = "sheets/checkpoint.txt"  # the last thing that a method leaves: which checkpoint its sheets show
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 72em; padding: 0 1em; color: #222 }
pre { background: #f4f4f4; padding: 1em; overflow-x: auto }
img { max-width: 100% }
figure { margin: 1em 0 2em }
figcaption { color: #666 }
"""


def main() -> None:
    """Run the demo for the configs and overrides of the command line."""
    arguments = sys.argv[1:]
    if {"-h", "--help"} & set(arguments):
        print(__doc__)
        return
    overrides = [item for item in arguments if "=" in item and not item.startswith("out=")]
    folders = [item.removeprefix("out=") for item in arguments if item.startswith("out=")]
    names = [item for item in arguments if "=" not in item] or list(CONFIGS)
    # Other settings are another demo: it does not meet the runs of this one.
    name_of = "_".join([FOLDER.name, *(re.sub(r"[^\w.=]+", "_", item) for item in overrides)])
    out = Path(folders[-1]).absolute() if folders else project_path(FOLDER.with_name(name_of[:100]))
    if any(item.startswith("train.resume=") for item in overrides):
        raise ValueError(
            f"the demo decides itself what goes on; for a fresh one, delete {out} or use out=DIR"
        )
    generated = any(item.startswith("data.generate.") for item in overrides)
    if generated and not any(item.startswith("data.root=") for item in overrides):
        overrides.append(f"data.root={out / 'data'}")  # other scenes lie beside those of the usual demo
    started = time.monotonic()
    for name in names:
        if config_of(name, out, overrides).stages:
            raise ValueError(f"{name} is a pipeline: python scripts/train_voc.py config={name}")
        make_demo_data.run(config_of(name, out, overrides))
    todo = [name for name in names if not (out / Path(name).parent.name / DRAWN).is_file()]
    if len(todo) > 1 and core_count() > 1:
        train_side_by_side(todo, out, overrides)
    records, sheets = [], {}
    for name in names:
        title = title_of(name)
        print(f"--- {title}: {name}", flush=True)
        scores, sheets[title] = run_method(name, out, overrides)
        records.append({"method": title, "config": name, "overrides": overrides, **scores})
    table = results_table(records)
    write_atomic(out / "table.txt", (table + "\n").encode())
    write_atomic(out / "scores.json", json.dumps(records, indent=1).encode())
    write_atomic(out / "report.html", report(table, records, sheets, out).encode())
    minutes = (time.monotonic() - started) / 60
    print(f"\n{table}\n\npictures and numbers: {out / 'report.html'}   ({minutes:.1f} minutes)")


def title_of(name: str) -> str:
    """What a config's method is called in the table."""
    method = Path(name).parent.name
    return TITLES.get(method, method)


def config_of(name: str, out: Path, overrides: Sequence[str]) -> DictConfig:
    """A config with a run folder below ``out``."""
    method = Path(name).parent.name
    given = [f"run_name=demo/{method}", f"work_dir={out / method}", "data.val_set=null"]
    return load_config(name, [*given, *overrides])


def run_method(name: str, out: Path, overrides: Sequence[str]) -> tuple[dict[str, Any], list[Path]]:
    """Train, score and draw one method, or read what is there already; scores and sheets."""
    cfg = config_of(name, out, overrides)
    checkpoint = train(cfg) / "last.pth"
    return score(cfg, checkpoint), draw(checkpoint)


def train_side_by_side(names: Sequence[str], out: Path, overrides: Sequence[str]) -> None:
    """Every method in a process of its own: networks this small gain little from a second thread."""
    # One more than there are cores: none is idle while the last method trains.
    workers = min(len(names), core_count() + 1)
    threads = [f"train.threads={max(core_count() // workers, 1)}"]
    print(f"{', '.join(map(title_of, names))}: {workers} at a time, {threads[0]}", flush=True)
    # None waits in the pool, where it would begin after Ctrl-C. The longest come first.
    with WorkerPool(workers, in_flight=workers) as pool:
        for name in reversed(names):
            pool.submit(_named_run, name, out, [*threads, *overrides])


def _named_run(name: str, out: Path, overrides: Sequence[str]) -> None:
    shown = _Titled(sys.stdout, f"{title_of(name):<16} | ")
    with contextlib.redirect_stdout(shown), contextlib.redirect_stderr(shown):
        run_method(name, out, overrides)


class _Titled(io.TextIOBase):
    """Puts a title before every line and leaves progress bars out, which several processes cannot share."""

    def __init__(self, stream: TextIO, title: str) -> None:
        self.stream, self.title, self.rest = stream, title, ""

    def write(self, text: str) -> int:
        *lines, self.rest = (self.rest + text).split("\n")
        shown = [line for line in lines if line.strip() and "\r" not in line]
        self.stream.write("".join(f"{self.title}{line}\n" for line in shown))
        return len(text)

    def flush(self) -> None:
        self.stream.flush()


def score(cfg: DictConfig, checkpoint: Path) -> dict[str, Any]:
    """Scores of a checkpoint on both test splits; read back when it was scored before."""
    loaded = load_method(checkpoint, "cpu")
    kept = checkpoint.parent / "demo_scores.json"
    if kept.is_file() and (record := json.loads(kept.read_text()))["checkpoint"] == loaded.sha256:
        return record
    record = {"checkpoint": loaded.sha256, "steps": loaded.step}
    for name in SPLITS:
        split = load_split(cfg.data, name)
        result = validate(
            loaded.method,
            WeakSegDataset(split, with_mask=True),
            size=cfg.eval.size,
            device="cpu",
            batch_size=8,
            num_workers=cfg.data.num_workers,
        )
        entries = result.records(protocols(loaded.method, name), {}, {})
        record[name] = {
            "images": int(result.images),
            "size": cfg.eval.size,
            "provenance": provenance(cfg, split),
            **{f"{entry['protocol'].split('/')[0]}_protocol": entry["protocol"] for entry in entries},
            "tag_f1": 100 * result.results["tag_f1"][""].mean,
            **{f"{output}_miou": 100 * values.mean for output, values in result.results["miou"].items()},
            **{f"{output}_confusion": values.mean for output, values in result.results["confusion"].items()},
        }
    write_atomic(kept, json.dumps(record, indent=1).encode())
    return record


def draw(checkpoint: Path) -> list[Path]:
    """Sheets of a few images of each test split."""
    stamp, digest = checkpoint.parent / DRAWN, load_method(checkpoint, "cpu").sha256
    if not (stamp.is_file() and stamp.read_text() == digest):
        for split in SPLITS:
            options = {"infer": split, "count": SHEET_IMAGES // 2, "out": stamp.parent, "device": "cpu"}
            visualize.run(visualize.Options(model_path=checkpoint, **options))
        write_atomic(stamp, digest.encode())
    return sorted(stamp.parent.glob("*.png"))


def results_table(records: list[dict[str, Any]]) -> str:
    """One line per method: mIoU on both splits, their difference, and the confusion ratio."""
    header = ["mIoU %", "CAM", "shuffled", "gap", "aux CAM", "shuffled", "seg", "shuffled", "tag F1", "FP/TP"]
    rows = []
    for record in records:
        near, far = record["test"], record["test_shuffled"]
        gap = near["cam_miou"] - far["cam_miou"]
        cells = [
            near["cam_miou"], far["cam_miou"], gap, near.get("aux_cam_miou"), far.get("aux_cam_miou"),
            near.get("seg_miou"), far.get("seg_miou"), near["tag_f1"],
        ]  # fmt: skip
        numbers = ["-" if value is None else f"{value:.1f}" for value in cells]
        rows.append([record["method"], *numbers, f"{near['cam_confusion']:.2f}"])
    images = records[0]["test"]["images"]
    note = (
        f"{images} images per split; shuffled: the same objects on contexts drawn without them. CAM and\n"
        "FP/TP: true tags, scales and threshold of the config; seg: single scale, no CRF. Masks only score."
    )
    return f"{text_table(header, rows)}\n{note}"


def report(table: str, records: list[dict[str, Any]], sheets: dict[str, list[Path]], out: Path) -> str:
    """A page with the table and the sheets of every method."""
    parts = [f"<h1>tag2mask demo</h1>\n<pre>{html.escape(table)}</pre>"]
    for record in records:
        about = f"{record['config']}, {record['steps']} steps"
        parts.append(f"<h2>{html.escape(record['method'])}</h2>\n<p>{html.escape(about)}</p>")
        for path in sheets[record["method"]]:
            title = "contexts shuffled" if SPLITS[1] in path.name else "contexts as in training"
            picture = f'<img src="{path.relative_to(out)}" alt="{title}">'
            parts.append(f"<figure>{picture}<figcaption>{title}</figcaption></figure>")
    head = '<meta charset="utf-8"><title>tag2mask demo</title>'
    return f'<!doctype html><html lang="en">{head}<style>{STYLE}</style>\n' + "\n".join(parts)


if __name__ == "__main__":
    run_main(main)
