"""Do methods break co-occurrence? Train them on scenes whose objects are more and more often on one context.

    python bench/cooccurrence.py --methods cam seco --strengths 0.95
    python bench/cooccurrence.py --shard 2/8                            every eighth training, for a job array
    python bench/cooccurrence.py --methods seco --name no-lil method.loss_weights.lil=0.0    a variant
    python bench/cooccurrence.py --methods psa irn --config "{method}/demo_cda.yaml"    pipelines

What is finished below ``--out`` is not done again. trainings.csv has each training, table.csv and table.txt
means and intervals, report.html all of it. docs/evidence.md explains the numbers. A pipeline also has its
walk, and a walk that knows the masks. Intervals are over seeds (Student's t), of one seed over images
(bootstrap); ``slope`` is the rise from strength 0 to 1. ``less cam+long`` is the difference to the CAM of the
plain classifier (``cam``) of the same strength and seed, whose name is the longest beginning of the variant's
(``long`` of ``long-no-ptc``). A strength of 1/6 is chance.
"""

from __future__ import annotations

import re
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, product
from pathlib import Path
from statistics import linear_regression
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from omegaconf import DictConfig
    from torch import Tensor

    from engine.report import Chart
    from methods.base import Method

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from engine.config.options import command_line, option

SPLITS = ("test", "test_shuffled")
LEAKS = ("leak", "control leak", "leak at recall", "tag leak", "control tag leak")
COLUMNS = ("mIoU", "shuffled", "gap", *LEAKS)
THRESHOLDS = tuple(i / 20 for i in range(20))  # of CAMs
RECALL = 0.2  # of the partnered classes: leaks are compared at it, because CAMs differ in scale
Row = dict[str, Any]  # the numbers of an output of a training, in percent


@dataclass(kw_only=True)
class Options:
    """Which methods are trained on which scenes."""

    methods: list[str] = option(["cam", "toco", "seco"], "folders of configs")
    config: str = option("{method}/demo.yaml", "where the config of each method is")
    strengths: list[float] = option([0.1667, 0.5, 0.8, 0.95], "how often a partnered class is on its partner")
    seeds: list[int] = option([0, 1, 2], "of the trainings; the scenes stay")
    train: int = option(1500, "training images", least=1)
    test: int = option(400, "images of each test split", least=1)
    shard: str = option("0/1", "which part of the trainings is done here: k/n, k from 0")
    out: Path = option(Path("logs/cooccurrence"), "folder for scenes, trainings and tables")
    name: str = option("", "what the table calls these overrides; they are trained beside those without")
    overrides: list[str] = option([], "changes of every config")


def run(options: Options) -> Path:
    """Train and measure what is not there yet, then write the tables; returns the folder.

    Raises:
        ValueError: wrong shard or name, or what is there has another config; nothing is trained then.
    """
    import torch

    from utils.files import atomic_file

    if not re.fullmatch(r"[\w.-]*", options.name):
        raise ValueError(f"--name {options.name}: use letters, digits, '.', '_' and '-'")
    found = re.fullmatch(r"(\d+)/(\d+)", options.shard)
    part, parts = map(int, found.groups()) if found else (0, 0)
    if part >= parts:
        raise ValueError(f"--shard {options.shard}: expected k/n with k from 0 to n - 1, such as 0/8")
    jobs = list(product(options.seeds, options.strengths, options.methods))[part::parts]
    trainings = [training(options, *job) for job in jobs]
    for strength in options.strengths:
        draw_scenes(options, strength)
    for cfg, config, overrides in trainings:
        file = Path(cfg.work_dir) / "measures.pt"
        if not file.is_file():
            print(f"--- {cfg.run_name}", flush=True)
            train(cfg, config, overrides)
            measured = {path.parent.name: measure(path) for path in checkpoints(file.parent)}
            with atomic_file(file) as stream:
                torch.save(measured, stream)
    print(write_tables(options.out))
    return options.out


def training(options: Options, seed: int, strength: float, method: str) -> tuple[DictConfig, str, list[str]]:
    """Config of a training or pipeline, and what it is made of; what is in its folder must have it too."""
    from omegaconf import OmegaConf

    from engine.config.load import load_config, to_plain
    from engine.config.schema import frozen_differences

    variant = f"{method}+{options.name}" if options.name else method
    folder = options.out / f"{variant}-{strength:g}-{seed}"
    root = options.out.absolute() / f"scenes-{strength:g}"
    given = [f"data.root={root}", f"work_dir={folder}", f"run_name={folder.name}", f"seed={seed}"]
    config, overrides = options.config.format(method=method), [*options.overrides, *given]
    cfg = load_config(config, overrides)
    if not cfg.stages:
        cfg.data.val_set = None
    for file in folder.glob("*.yaml"):  # config.yaml of a training, pipeline.yaml
        if changed := frozen_differences(to_plain(OmegaConf.load(file)), to_plain(cfg)):
            shown = "; ".join(changed[:3])
            raise ValueError(f"{folder} was trained with another config ({shown}): change --name or --out")
    return cfg, config, overrides


def draw_scenes(options: Options, strength: float) -> None:
    """Draw the scenes of a strength, unless they are there."""
    from tools import make_demo_data
    from utils.files import alone_in

    root = options.out / f"scenes-{strength:g}"
    root.mkdir(parents=True, exist_ok=True)
    changed = [item for item in options.overrides if item.startswith("data.generate.")]
    scenes = [item.removeprefix("data.generate.") for item in changed]
    scenes += [f"strength={strength}", f"train={options.train}", f"test={options.test}"]
    with alone_in(root, wait=3600):  # another shard may draw them
        make_demo_data.run(make_demo_data.Options(out=root, overrides=scenes))


def train(cfg: DictConfig, config: str, overrides: Sequence[str]) -> None:
    """Train a network, or run a pipeline."""
    from engine import train
    from engine.pipeline import runner

    if cfg.stages:
        runner.run(config, overrides)
    else:
        train.run(cfg)


def checkpoints(folder: Path) -> list[Path]:
    """Last checkpoints of the networks that predict: of a pipeline its classifiers and segmentors."""
    stages = [*folder.glob("cam_net*/last.pth"), *folder.glob("segment*/last.pth")]
    return stages or [folder / "last.pth"]


def walkers(checkpoint: Path) -> dict[str, Method]:
    """What spreads the CAMs of a pipeline's classifier: its affinity network, and an oracle with masks."""
    from engine.inference import load_method

    path = checkpoint.parent.with_name(checkpoint.parent.name.replace("cam_net", "affinity")) / "last.pth"
    if path == checkpoint or not path.is_file():
        return {}
    learned = load_method(path, "cpu").method
    target = f"method.target=bench.oracles.{type(learned).__name__}TrueWalk"
    return {"walk": learned, "true walk": load_method(path, "cpu", [target]).method}


def measure(checkpoint: Path) -> dict[str, Any]:
    """Counts of every image of both test splits, as a checkpoint predicts it."""
    import torch
    import torch.nn.functional as F

    from datasets.base import WeakSegDataset
    from engine.data import load_split
    from engine.inference import load_method
    from engine.scores.base import confusion_matrix
    from engine.scores.context_leak import ground_counts
    from engine.validation import predicted_image
    from ops.labels import threshold_label
    from utils.image import normalize
    from utils.logging import progress_bar

    loaded, walks = load_method(checkpoint, "cpu"), walkers(checkpoint)
    measures: dict[str, Any] = {}
    for name in SPLITS:
        split = load_split(loaded.cfg.data, name)
        dataset = WeakSegDataset(split, with_mask=True)
        columns, sums = defaultdict(list), defaultdict(int)
        for sample in progress_bar((dataset[i] for i in range(len(dataset))), total=len(dataset), desc=name):
            image, mask = normalize(sample["image"])[None], sample["mask"]
            with torch.inference_mode():
                out = loaded.method.predict(image, loaded.method.cam_scales)
            found = predicted_image(loaded.method, out, 0, sample)
            channels = sample["class_label"].nonzero()[:, 0]
            for output, method in walks.items():
                found.labels[output] = torch.zeros_like(mask)
                if len(channels):
                    cam = out.cam if method.walk_stride == 1 or out.strided_cam is None else out.strided_cam
                    given = mask[None, None] if output == "true walk" else image
                    winner = method.propagate(given, cam[0, channels]).argmax(0)
                    found.labels[output] = F.pad(channels + 1, (1, 0))[winner]
            for output, label in found.labels.items():
                matrix = confusion_matrix(mask, label, split.num_classes)
                hits, truth, predicted = matrix.diagonal(), matrix.sum(1), matrix.sum(0)
                columns[f"{output}/iou"].append(torch.stack([hits, truth + predicted - hits], 1))
                ground = ground_counts(sample["context"], mask, label, split.num_classes)
                columns[f"{output}/ground"].append(ground)
            for output, (score, label) in found.cams.items():
                for i, threshold in enumerate(THRESHOLDS):
                    painted = threshold_label(score, label, threshold)
                    ground = ground_counts(sample["context"], mask, painted, split.num_classes)
                    sums[f"{output}/grounds", i] += ground
                    hits = torch.bincount(mask[mask == painted], minlength=split.num_classes)
                    sums[f"{output}/hits", i] += hits[1:]
            sums["objects", 0] += torch.bincount(mask.flatten(), minlength=256)[1 : split.num_classes]
            columns["said"].append(out.class_logits[0] > 0)
            columns["tags"].append(sample["class_label"] > 0)
            columns["context"].append(sample["context"][-1].mode().values)
        for (key, _), total in sums.items():
            columns[key].append(total)
        measures[name] = {key: torch.stack(values) for key, values in columns.items()}
        measures["class_names"] = split.class_names
    return measures


def numbers(measures: dict[str, Any]) -> Iterator[tuple[str, dict[str, float]]]:
    """Every output of a network with its numbers, in percent."""
    import torch

    from datasets.demo.contexts import CONTEXTS
    from datasets.demo.objects import OBJECTS
    from datasets.demo.scene import SceneOptions
    from engine.scores.context_leak import leak_of_counts

    matched, shuffled = (measures[name] for name in SPLITS)
    names = measures["class_names"]
    partnered = torch.tensor([name in SceneOptions().partnered for name in names[1:]])
    said, absent = shuffled["said"].double(), ~shuffled["tags"]
    at_home = torch.stack([shuffled["context"] == CONTEXTS.index(OBJECTS[k].home) for k in names[1:]], 1)
    on, off = absent & at_home, absent & ~at_home
    tag_leak = (said * on).sum(0) / on.sum(0) - (said * off).sum(0) / off.sum(0)
    images = resampled(len(said))
    for key in matched:
        output, _, what = key.partition("/")
        if what != "iou":
            continue
        near, far = (mean_iou(images @ split[key].double().flatten(1)) for split in (matched, shuffled))
        ground = shuffled[f"{output}/ground"].double()
        leak = leak_of_counts((images @ ground.flatten(1)).unflatten(1, ground.shape[1:]), names)
        found = {
            "mIoU": near,
            "shuffled": far,
            "gap": near - far,
            "leak": leak[:, partnered].nanmean(1),
            "control leak": leak[:, ~partnered].nanmean(1),
            "leak at recall": leak_at_recall(shuffled, output, names, partnered),
            "tag leak": tag_leak[partnered].nanmean()[None],
            "control tag leak": tag_leak[~partnered].nanmean()[None],
        }
        row = {name: 100 * float(values[0]) for name, values in found.items()}
        for name in ("gap", "leak"):
            low, high = 100 * found[name][1:].quantile(torch.tensor([0.025, 0.975], dtype=torch.float64))
            row |= {f"{name} from": float(low), f"{name} to": float(high)}
        yield output, row


def leak_at_recall(
    counts: dict[str, Tensor], output: str, class_names: Sequence[str], partnered: Tensor
) -> Tensor:
    """(1,) leak at the threshold that finds ``RECALL`` of the partnered classes, linear between thresholds.

    nan where there are no thresholds, or where all of them find more, or less.
    """
    import numpy as np
    import torch

    from engine.scores.context_leak import leak_of_counts

    if f"{output}/hits" not in counts:
        return torch.tensor([torch.nan])
    recall = (counts[f"{output}/hits"] / counts["objects"])[:, partnered].mean(1)
    leak = leak_of_counts(counts[f"{output}/grounds"], class_names)[:, partnered].nanmean(1)
    return torch.tensor([np.interp(RECALL, recall.flip(0), leak.flip(0), torch.nan, torch.nan)])


def resampled(images: int, samples: int = 1000) -> Tensor:
    """(1 + samples, images) how often each image counts: first once each, then as a bootstrap draws them."""
    import torch

    draws = torch.randint(images, (samples, images), generator=torch.Generator().manual_seed(0))
    weights = torch.zeros(1 + samples, images, dtype=torch.float64)
    weights[0] = 1
    weights[1:].scatter_add_(1, draws, torch.ones_like(weights[1:]))
    return weights


def mean_iou(counts: Tensor) -> Tensor:
    """(S,) of intersections and unions (S, K * 2)."""
    hits, union = counts.unflatten(1, (-1, 2)).unbind(2)
    return (hits / union).nanmean(1)


def write_tables(out: Path) -> str:
    """The table of all measured trainings; writes it beside them."""
    from engine.report import REPORT, write_page
    from engine.runs import interval, load_run
    from engine.scores.tables import text_table
    from utils.files import write_atomic, write_csv
    from utils.weights import load_checkpoint

    rows = []
    for file in sorted(out.glob("*/measures.pt")):
        if not (parts := re.fullmatch(r"(.+)-([\d.]+)-(\d+)", file.parent.name)):
            continue  # a copy
        method, strength, seed = parts.groups()
        measured = load_checkpoint(file)
        for network, measures in measured.items():
            for output, found in numbers(measures):
                title = output if len(measured) == 1 else f"{network} {output}"
                row = {"method": method, "output": title, "strength": float(strength), "seed": int(seed)}
                rows.append(row | found)
    if not rows:
        return "nothing is measured yet"
    write_csv(out / "trainings.csv", [list(rows[0]), *(row.values() for row in rows)])

    cams, groups, curves = defaultdict(dict), defaultdict(list), defaultdict(list)
    for row in rows:
        if row["output"] == "cam" and row["method"].partition("+")[0] == "cam":
            cams[row["strength"], row["seed"]][row["method"]] = row
    for row in rows:
        method, output, strength, seed = (row[key] for key in ("method", "output", "strength", "seed"))
        groups[method, output, f"{strength:g}"].append(row)
        curves[method, output, seed].append(row)
        if base := base_of(method, cams[strength, seed]):
            less = {column: row[column] - cams[strength, seed][base][column] for column in COLUMNS}
            groups[method, output, f"{strength:g} less {base}"].append(less)
    curves = {key: curve for key, curve in curves.items() if len(curve) > 1}
    for (method, output, _), curve in curves.items():
        groups[method, output, "slope"].append({column: slope(curve, column) for column in COLUMNS})
    head, spread = ["method", "output", "strength", "seeds"], [f"{column} ±" for column in COLUMNS]
    cells, means = [], [[*head, *chain(*zip(COLUMNS, spread))]]
    for key, group in sorted(groups.items()):
        known = [*key, str(len(group))]
        cells.append([*known, *(cell(group, column) for column in COLUMNS)])
        means.append([*known, *chain(*(interval([row[column] for row in group]) for column in COLUMNS))])
    write_csv(out / "table.csv", means)
    table = text_table([*head, *COLUMNS], cells)
    write_atomic(out / "table.txt", f"{table}\n".encode())
    runs = [load_run(file.parent) for file in sorted(out.glob("*/run.json"))]
    write_page(runs, out / REPORT, "Co-occurrence", table, {"Scores over strength": strength_charts(curves)})
    return table


def strength_charts(curves: dict[tuple[str, str, int], list[Row]]) -> list[Chart]:
    """Gap and leak over the strength, by method and output; a line for each seed."""
    from engine.report import Chart

    charts: dict[str, Chart] = {}
    for (method, output, seed), curve in curves.items():
        for column in ("gap", "leak"):
            title = f"{method}, {output}: {column} %"
            points = sorted((row["strength"], row[column]) for row in curve)
            chart = charts.setdefault(title, Chart(title, axis="strength"))
            chart.lines.append((0, f"seed {seed}", points))
    return list(charts.values())


def base_of(method: str, trained: Iterable[str]) -> str:
    """The plain classifier with the longest beginning of a variant's name; empty: there is none."""
    _, plus, name = method.partition("+")
    own = f"cam{plus}{name}-"
    fitting = (base for base in trained if base != method and own.startswith((f"{base}-", f"{base}+")))
    return max(fitting, key=len, default="")


def slope(curve: Sequence[Row], column: str) -> float:
    """Least-squares rise of a number from strength 0 to strength 1, of the trainings of one seed."""
    return linear_regression([row["strength"] for row in curve], [row[column] for row in curve]).slope


def cell(group: Sequence[Row], column: str) -> str:
    """Mean and 95 % interval over seeds; of one seed that over images, where known. A dash: undefined."""
    from engine.runs import interval_text

    values = [row[column] for row in group]
    if any(value != value for value in values):
        return "-"
    text = interval_text(values)
    if len(group) == 1 and f"{column} from" in group[0]:
        text += f" [{group[0][f'{column} from']:.1f}, {group[0][f'{column} to']:.1f}]"
    return text


if __name__ == "__main__":
    command_line(Options, run, __doc__)
