"""The whole job on generated scenes: make data, train, score on two test splits, one table, one page.

    python scripts/demo.py                                  plain classifier, ToCo and SeCo
    python scripts/demo.py configs/toco/demo.yaml seed=1    these configs, with overrides for all of them

logs/demo/ (out=DIR: elsewhere) then holds report.html, table.txt, scores.json and a run folder per method.
What is finished is not done again; an interrupted demo continues.
"""

import contextlib
import io
import json
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.cli import run_main

METHODS = {
    "configs/cam/demo.yaml": "plain classifier", "configs/toco/demo.yaml": "ToCo",
    "configs/seco/demo.yaml": "SeCo", "configs/mcc/demo.yaml": "MCC",
    "configs/one_stage/demo.yaml": "1-stage-wseg", "configs/ws_fcn/demo.yaml": "WS-FCN",
}  # fmt: skip
CONFIGS = tuple(METHODS)[:3]
# Same objects and partners as in train; and the same objects on contexts that were drawn without them.
SPLITS = {"test": "contexts as in training", "test_shuffled": "contexts shuffled"}
COLUMNS = ("cam", "aux_cam", "seg")
HEADER = ["mIoU %", "CAM", "shuffled", "gap", "leak", "aux CAM", "shuffled", "seg", "shuffled", "leak"]
HEADER += ["tag F1", "FP/TP"]


def main() -> None:
    """Run the demo for the configs and overrides of the command line."""
    arguments = sys.argv[1:]
    if {"-h", "--help"} & set(arguments):
        print(__doc__)
        return
    from engine.config.load import load_config, project_path
    from engine.report import REPORT, write_report
    from tools import make_demo_data

    folders = [item.removeprefix("out=") for item in arguments if item.startswith("out=")]
    overrides = [item for item in arguments if "=" in item and not item.startswith("out=")]
    names = [item for item in arguments if "=" not in item] or list(CONFIGS)
    # Other settings are another demo, in a folder of its own.
    title = "_".join(["demo", *(re.sub(r"[^\w.=]+", "_", item) for item in overrides)])[:100]
    out = Path(folders[-1]).absolute() if folders else project_path(Path("logs") / title)
    scenes = [item.removeprefix("data.generate.") for item in overrides if item.startswith("data.generate.")]
    if scenes and not any(item.startswith("data.root=") for item in overrides):
        overrides.append(f"data.root={out / 'data'}")  # other scenes are beside those of the usual demo
    started = time.monotonic()
    for name in names:
        cfg = load_config(name, overrides)
        if cfg.stages:
            raise ValueError(f"{name} is a pipeline: python scripts/train_voc.py config={name}")
        root = project_path(cfg.data.root)
        make_demo_data.run(make_demo_data.Options(config=name, out=root, overrides=scenes))
    train_side_by_side(names, out, overrides)
    records = []
    for name in names:
        method = METHODS.get(name, name)
        print(f"--- {method}: {name}", flush=True)
        record = {"method": method, "config": name, "overrides": overrides}
        records.append(record | run_method(name, out, overrides))
    table = results_table(records)
    (out / "table.txt").write_text(table + "\n", encoding="utf-8")
    (out / "scores.json").write_text(json.dumps(records, indent=1))
    page = write_report([folder_of(name, out) for name in names], out / REPORT, "tag2mask demo", table)
    minutes = (time.monotonic() - started) / 60
    print(f"\n{table}\n\npictures and numbers: {page}   ({minutes:.1f} minutes)")


def folder_of(name: str, out: Path) -> Path:
    """The run folder of a config."""
    return out / Path(name).parent.name


def finished_file(name: str, out: Path) -> Path:
    """The last file that a method writes: its scores."""
    return folder_of(name, out) / "demo_scores.json"


def run_method(name: str, out: Path, overrides: Sequence[str]) -> dict[str, Any]:
    """Train, draw and score one method; what is there already is read back."""
    from datasets.base import WeakSegDataset
    from engine.config.load import load_config, to_plain
    from engine.data import load_split
    from engine.inference import load_method
    from engine.report import REPORT, write_report
    from engine.scores.base import plain
    from engine.scores.evaluation import SCORES
    from engine.scores.records import provenance, write_scores
    from engine.seen import record_seen
    from engine.train import run as train
    from engine.validation import protocols, validate
    from utils.build import build

    folder, finished = folder_of(name, out), finished_file(name, out)
    given = [f"run_name=demo/{folder.name}", f"work_dir={folder}", "data.val_set=null"]
    cfg = load_config(name, [*given, *overrides])
    loaded = load_method(train(cfg) / "last.pth", "cpu")
    if finished.is_file() and (record := json.loads(finished.read_text()))["checkpoint"] == loaded.sha256:
        return record
    record = {"checkpoint": loaded.sha256, "steps": loaded.step}
    settings = {"size": cfg.eval.size, "batch_size": 8, "num_workers": cfg.data.num_workers, "device": "cpu"}
    size, partnered = cfg.eval.size, build(to_plain(cfg)["data"]["generate"]).partnered
    for split_name in SPLITS:
        split = load_split(cfg.data, split_name)
        dataset = WeakSegDataset(split, with_mask=True)
        scored = validate(loaded.method, dataset, scores=(*SCORES, "context_leak"), **settings)
        made_by = provenance(cfg, split) | loaded.provenance()
        entries = scored.records(protocols(loaded.method, split_name), {"size": size}, made_by)
        write_scores(folder, entries)
        record_seen(folder, scored, loaded.method, dataset, step=loaded.step, size=size, device="cpu")
        found = {"images": int(scored.images), "protocols": [entry["protocol"] for entry in entries]}
        found |= scored.percent() | {"FP/TP": scored.results["confusion"]["cam"].mean}
        classes = [split.class_names.index(name) for name in partnered]
        for output, values in scored.results["context_leak"].items():
            leak = values.per_class["context_leak"][classes].nanmean()
            found[f"{output}_leak"] = plain(100 * leak)
        record[split_name] = found
    write_report([folder], folder / REPORT)
    finished.write_text(json.dumps(record, indent=1))
    return record


def train_side_by_side(names: Sequence[str], out: Path, overrides: Sequence[str]) -> None:
    """Every method in a process of its own: networks this small gain little from a second thread."""
    from utils.pool import WorkerPool, core_count

    names = [name for name in names if not finished_file(name, out).is_file()]
    if len(names) < 2 or core_count() < 2:
        return
    # One more than there are cores: none is idle while the last method trains.
    workers = min(len(names), core_count() + 1)
    threads = f"train.threads={max(core_count() // workers, 1)}"
    titles = ", ".join(METHODS.get(name, name) for name in names)
    print(f"{titles}: {workers} at a time, {threads}", flush=True)
    # None waits in the pool, where it would begin after Ctrl-C. The longest come first.
    with WorkerPool(workers, in_flight=workers) as pool:
        for name in reversed(names):
            pool.submit(_named_run, name, out, [threads, *overrides])


def _named_run(name: str, out: Path, overrides: Sequence[str]) -> None:
    shown = _Titled(sys.stdout, f"{METHODS.get(name, name):<16} | ")
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


def results_table(records: list[dict[str, Any]]) -> str:
    """One line per method: mIoU on both splits, their difference, context leak and confusion ratio."""
    from engine.scores.tables import text_table

    rows = []
    for record in records:
        near, far = record["test"], record["test_shuffled"]
        cells = [split.get(column) for column in COLUMNS for split in (near, far)]
        gap, leaks = near["cam"] - far["cam"], [far.get("cam_leak"), far.get("seg_leak")]
        cells = [*cells[:2], gap, leaks[0], *cells[2:], leaks[1], near["tag_f1"]]
        numbers = ["-" if value is None else f"{value:.1f}" for value in cells]
        rows.append([record["method"], *numbers, f"{near['FP/TP']:.2f}"])
    return (
        f"{text_table(HEADER, rows)}\n{records[0]['test']['images']} images per split; shuffled: the same "
        "objects on contexts drawn without them. leak: how much\nmore of its partner context a class is "
        "painted on there than of others. CAM and FP/TP: true tags, scales and\nthreshold of the config; "
        "seg: single scale, no CRF. Masks only score."
    )


if __name__ == "__main__":
    run_main(main)
