"""Generate the demo data set: scenes with planted co-occurrence in VOC layout (datasets/demo/scene.py).

    python tools/make_demo_data.py                                   what configs/datasets/demo.yaml says
    python tools/make_demo_data.py out=data/demo_080 strength=0.8    another folder, another option
    python tools/make_demo_data.py strength=0.8 overwrite=true       replace a set of other options
    python tools/make_demo_data.py --help                            every option with its meaning

A set that is already there is left alone; one that was interrupted is continued.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from datasets.demo.scene import SPLITS, SceneOptions
from utils.build import suggest
from utils.cli import run_main

DEFAULT_CONFIG = "datasets/demo.yaml"
OWN_KEYS = ("config", "out", "overwrite", "workers")


def run(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """Stage: generate what ``data.generate`` describes in ``data.root`` unless it is there.

    Returns:
        The content of meta.json.
    """
    from engine.config.load import project_path

    options = {key: value for key, value in cfg["data"]["generate"].items() if key != "target"}
    return generate(project_path(cfg["data"]["root"]), options)


def generate(root: Path, options: Mapping[str, Any], **how: Any) -> dict[str, Any]:
    """Check the options, write the set, and say where it is.

    Args:
        how: ``overwrite`` and ``workers`` of ``write_dataset``.

    Raises:
        KeyError: for an option that does not exist; names the closest one.
    """
    from datasets.demo.write import write_dataset

    known = {field.name for field in fields(SceneOptions)}
    for key in options:
        if key not in known:
            raise KeyError(f"'{key}' is not an option of the generator{suggest(key, {*known, *OWN_KEYS})}")
    checked = SceneOptions(**options)
    meta = write_dataset(root, checked, **how)
    counts = ", ".join(f"{split} {checked.count(split)}" for split in SPLITS)
    print(f"demo data in {root}: {counts} images of {len(checked.classes)} classes, {meta['fingerprint']}")
    return meta


def main() -> None:
    """Read ``key=value`` arguments: options of the generator, or out, overwrite, workers, config."""
    arguments = sys.argv[1:]
    if {"-h", "--help"} & set(arguments):
        print(__doc__)
        print(SceneOptions.__doc__)
        return
    import yaml

    from engine.config.load import find_config, project_path

    given: dict[str, Any] = {}
    for item in arguments:
        key, separator, value = item.partition("=")
        if not separator:
            raise ValueError(f"'{item}' is not key=value, for example strength=0.8 (all keys: --help)")
        given[key] = value if key in ("config", "out") else yaml.safe_load(value)
    own = {key: given.pop(key) for key in OWN_KEYS if key in given}
    path = find_config(own.get("config", DEFAULT_CONFIG))
    data = yaml.safe_load(Path(path).read_text(encoding="utf-8"))["data"]
    options = {key: value for key, value in data["generate"].items() if key != "target"} | given
    root = Path(own["out"]) if "out" in own else project_path(data["root"])
    generate(root, options, overwrite=bool(own.get("overwrite", False)), workers=own.get("workers"))


if __name__ == "__main__":
    run_main(main)
