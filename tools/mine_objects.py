"""Cut out the objects of a folder of pseudo labels: the bank that data.context_decoupling pastes from.

    python tools/mine_objects.py --labels logs/irn_voc/pseudo config=configs/irn/voc.yaml --out logs/objects

An image gives an object if its label holds a single class that covers neither too little nor too much of it
(Su et al., ICCV 2021). Run again, it continues where it stopped.
"""

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from engine.config.common import DataOptions
from engine.config.options import command_line, option


@dataclass(kw_only=True)
class Options(DataOptions):
    labels: Path = option(meaning="folder of label images of an earlier stage", reads=True)
    split: str | None = option(None, "split or list (.txt); default: data.train_set", reads="images")
    min_share: float = option(0.1, "smallest share of the image")
    max_share: float = option(0.7, "largest share of the image")
    out: Path | None = option(None, "folder of the bank; default: objects/ beside the labels")
    num_workers: int = option(2, "threads that read and write", free=True)

    def __post_init__(self) -> None:
        if not self.min_share <= self.max_share <= 1:
            shares = f"min_share {self.min_share} and max_share {self.max_share}"
            raise ValueError(f"{shares} must be two ascending shares in [0, 1]")


def run(options: Options) -> Path:
    """Make the bank; returns its folder."""
    from datasets.context_decoupling import mine_object, write_index
    from datasets.lists import real_classes
    from engine.data import data_config, load_split
    from engine.scores.records import short_name
    from engine.scores.tables import text_table
    from utils.cam_files import label_path
    from utils.files import claim_folder, origin_of
    from utils.logging import progress_bar
    from utils.pool import WorkerPool

    labels = options.labels
    config = data_config(options)
    split = load_split(config.data, options.split or config.data.train_set)
    split.require(labels, label_path, "the stage that makes them")
    out = options.out or labels.with_name("objects")
    about = {"split": short_name(split), "data_fingerprint": split.fingerprint()}
    limits = {"min_share": options.min_share, "max_share": options.max_share}
    claim_folder(out, {"labels": origin_of(labels), **about, **limits})
    objects: dict[int, list[str]] = {k: [] for k in real_classes(split.class_names) if k}
    with (
        progress_bar(total=len(split), desc="objects", unit="img") as bar,
        WorkerPool(options.num_workers, threads=True) as pool,
    ):

        def count(name: str, class_id: int | None) -> None:
            bar.update()
            if class_id is not None:
                objects[class_id].append(name)

        for record in split.records:
            pool.submit(mine_object, record, labels, out, *limits.values(), then=partial(count, record.name))
    write_index(out, split.class_names, objects)
    rows = [[split.class_names[k], str(len(names))] for k, names in objects.items()]
    total = sum(len(names) for names in objects.values())
    print(text_table(["Class", "objects"], [*rows, ["mean", f"{total / len(objects):.1f}"]]))
    print(f"objects  {total} out of {len(split)} images in {out}")
    if empty := [split.class_names[k] for k, names in objects.items() if not names]:
        print(f"no objects of {len(empty)} classes ({', '.join(empty)}): they are never pasted")
    return out


if __name__ == "__main__":
    command_line(Options, run, __doc__)
