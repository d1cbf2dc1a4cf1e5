"""Generate the demo data set: scenes with planted co-occurrence in VOC layout (datasets/demo/scene.py).

    python tools/make_demo_data.py                                       what configs/datasets/demo.yaml says
    python tools/make_demo_data.py --out data/demo_080 strength=0.8      another folder, another option

Options of the scenes are those of `datasets.demo.scene.SceneOptions`. A set that is already there is left
alone; one that was interrupted is continued.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from engine.config.options import command_line, option


@dataclass(kw_only=True)
class Options:
    config: str = option("datasets/demo.yaml", "config whose data.generate describes the scenes")
    out: Path | None = option(None, "folder of the data set; default: data.root of the config")
    workers: int | None = option(None, "processes; default: one for each core", free=True, least=1)
    overrides: list[str] = option([], "an option of the scenes, such as strength=0.8")


def run(options: Options) -> dict[str, Any]:
    """Draw the data set unless it is there; returns the content of its ``meta.json``."""
    from datasets.demo.scene import SPLITS
    from datasets.demo.write import write_dataset
    from engine.config.load import load_config, project_path, to_plain
    from utils.build import build

    cfg = load_config(options.config, [f"data.generate.{item}" for item in options.overrides])
    scenes = build(to_plain(cfg)["data"]["generate"])
    root = options.out or project_path(cfg.data.root)
    meta = write_dataset(root, scenes, workers=options.workers)
    counts = ", ".join(f"{split} {scenes.count(split)}" for split in SPLITS)
    print(f"demo data in {root}: {counts} images of {len(scenes.classes)} classes, {meta['fingerprint']}")
    return meta


if __name__ == "__main__":
    command_line(Options, run, __doc__)
