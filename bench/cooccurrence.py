"""Do methods break co-occurrence? Train them on scenes whose objects are more and more often on one context.

    python bench/cooccurrence.py                                        all trainings, one after another
    python bench/cooccurrence.py --methods cam seco --strengths 0.95    some of them
    python bench/cooccurrence.py --shard 2/8                            every eighth, for a job array
    python bench/cooccurrence.py --methods seco --name no-lil method.loss_weights.lil=0.0    a variant

Each training has a folder below ``--out``. What is finished is not done again. The table covers what is
there; table.csv holds every number of every training. A strength of 1/6 is chance: there are six contexts.

gap       mIoU on ``test`` less that on ``test_shuffled``: the same objects on contexts drawn without them
leak      engine/scores/context_leak.py on ``test_shuffled``; mean over the classes with a partner
tag leak  how much more often a class is said on its home context than on others, where it is not shown
control   the same, mean over the classes without a partner
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from engine.config.options import command_line, option

SPLITS = ("test", "test_shuffled")


@dataclass(kw_only=True)
class Options:
    """Which methods are trained on which scenes."""

    methods: list[str] = option(["cam", "toco", "seco"], "each with its configs/<method>/demo.yaml")
    strengths: list[float] = option(
        [0.1667, 0.5, 0.8, 0.95], "probabilities that an object of a partnered class is on its partner"
    )
    seeds: list[int] = option([0, 1, 2], "of the trainings; the scenes stay")
    train: int = option(1500, "training images", least=1)
    test: int = option(400, "images of each test split", least=1)
    shard: str = option("0/1", "which part of the trainings is done here: k/n, k from 0")
    out: Path = option(Path("logs/cooccurrence"), "folder for scenes, trainings and tables")
    name: str = option("", "what the table calls these overrides; they are trained beside those without")
    overrides: list[str] = option([], "changes of every config")


def run(options: Options) -> Path:
    """Train and measure what is not there yet, then write the tables; returns the folder."""
    part, parts = map(int, options.shard.split("/"))
    jobs = list(product(options.seeds, options.strengths, options.methods))
    for seed, strength, method in jobs[part::parts]:
        variant = f"{method}+{options.name}" if options.name else method
        folder = options.out / f"{variant}-{strength:g}-{seed}"
        if not (folder / "measures.pt").is_file():
            print(f"--- {folder.name}", flush=True)
            train_one(options, folder, method, strength, seed)
            measure(folder)
    print(write_tables(options.out))
    return options.out


def train_one(options: Options, folder: Path, method: str, strength: float, seed: int) -> None:
    """Draw the scenes of a strength and train a method on them."""
    from engine.config.load import load_config
    from engine.train import run as train
    from tools import make_demo_data
    from utils.files import alone_in

    root = options.out / f"scenes-{strength:g}"
    root.mkdir(parents=True, exist_ok=True)
    scenes = [f"strength={strength}", f"train={options.train}", f"test={options.test}"]
    with alone_in(root, wait=3600):  # another shard may draw them
        make_demo_data.run(make_demo_data.Options(out=root, overrides=scenes))
    given = [f"data.root={root.absolute()}", "data.val_set=null", f"seed={seed}"]
    given += [f"work_dir={folder}", f"run_name={folder.name}"]
    train(load_config(f"{method}/demo.yaml", [*options.overrides, *given]))


def measure(folder: Path) -> None:
    """Predict both test splits with the last checkpoint and keep the counts of every image."""
    import torch

    from datasets.base import WeakSegDataset
    from engine.data import load_split
    from engine.inference import load_method
    from engine.scores.base import confusion_matrix
    from engine.scores.context_leak import ground_counts
    from engine.validation import predicted_image
    from utils.files import atomic_file
    from utils.image import normalize
    from utils.logging import progress_bar

    loaded = load_method(folder / "last.pth", "cpu")
    measures: dict[str, object] = {}
    for name in SPLITS:
        split = load_split(loaded.cfg.data, name)
        dataset = WeakSegDataset(split, with_mask=True)
        columns = defaultdict(list)
        for sample in progress_bar((dataset[i] for i in range(len(dataset))), total=len(dataset), desc=name):
            with torch.inference_mode():
                out = loaded.method.predict(normalize(sample["image"])[None], loaded.method.cam_scales)
            found, mask = predicted_image(loaded.method, out, 0, sample), sample["mask"]
            for output, label in found.labels.items():
                matrix = confusion_matrix(mask, label, split.num_classes)
                hits, truth, predicted = matrix.diagonal(), matrix.sum(1), matrix.sum(0)
                columns[f"{output}/iou"].append(torch.stack([hits, truth + predicted - hits], 1))
                ground = ground_counts(sample["context"], mask, label, split.num_classes)
                columns[f"{output}/ground"].append(ground)
            columns["said"].append(out.class_logits[0] > 0)
            columns["tags"].append(sample["class_label"] > 0)
            columns["context"].append(sample["context"][-1].mode().values)
        measures[name] = {key: torch.stack(values) for key, values in columns.items()}
        measures["class_names"] = split.class_names
    with atomic_file(folder / "measures.pt") as file:
        torch.save(measures, file)


def numbers(folder: Path) -> Iterator[tuple[str, dict[str, float]]]:
    """Every output of a measured training with its numbers, in percent."""
    import torch

    from datasets.demo.contexts import CONTEXTS
    from datasets.demo.objects import OBJECTS
    from datasets.demo.scene import SceneOptions
    from engine.scores.context_leak import leak_of_counts

    measures = torch.load(folder / "measures.pt", weights_only=True)
    matched, shuffled = (measures[name] for name in SPLITS)
    names = measures["class_names"]
    partnered = torch.tensor([name in SceneOptions().partnered for name in names[1:]])
    said, absent = shuffled["said"].double(), ~shuffled["tags"]
    at_home = torch.stack([shuffled["context"] == CONTEXTS.index(OBJECTS[k].home) for k in names[1:]], 1)
    on, off = absent & at_home, absent & ~at_home
    tag_leak = (said * on).sum(0) / on.sum(0) - (said * off).sum(0) / off.sum(0)
    for key in matched:
        output, _, what = key.partition("/")
        if what != "iou":
            continue
        near, far = (mean_iou(split[key].sum(0)) for split in (matched, shuffled))
        leak = leak_of_counts(shuffled[f"{output}/ground"].sum(0), names)
        found = {"mIoU": near, "shuffled": far, "gap": near - far}
        for name, values in (("leak", leak), ("tag leak", tag_leak)):
            found |= {name: float(values[partnered].nanmean())}
            found |= {f"{name}, control": float(values[~partnered].nanmean())}
        yield output, {name: 100 * value for name, value in found.items()}


def mean_iou(counts: Tensor) -> float:
    """Of intersections and unions (K, 2)."""
    return float((counts[:, 0].double() / counts[:, 1]).nanmean())


def write_tables(out: Path) -> str:
    """The table of all measured trainings, mean and 95 % interval over seeds; writes it beside them."""
    from engine.runs import interval_text
    from engine.scores.tables import text_table
    from utils.files import write_atomic

    rows = []
    for folder in sorted(path.parent for path in out.glob("*/measures.pt")):
        method, strength, seed = folder.name.rsplit("-", 2)
        rows += [
            {"method": method, "strength": float(strength), "seed": int(seed), "output": output, **found}
            for output, found in numbers(folder)
        ]
    if not rows:
        return "nothing is measured yet"
    columns = list(rows[0])
    lines = [columns, *([row[column] for column in columns] for row in rows)]
    write_atomic(out / "table.csv", "".join(",".join(map(str, line)) + "\n" for line in lines).encode())
    groups = defaultdict(list)
    for row in rows:
        groups[row["method"], row["output"], row["strength"]].append(row)
    cells = [
        [method, output, f"{strength:g}", str(len(found))]
        + [interval_text([row[column] for row in found]) for column in columns[4:]]
        for (method, output, strength), found in sorted(groups.items())
    ]
    table = text_table(["method", "output", "strength", "seeds", *columns[4:]], cells)
    write_atomic(out / "table.txt", f"{table}\n".encode())
    return table


if __name__ == "__main__":
    command_line(Options, run, __doc__)
