"""From the ``data`` section of a config to splits."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from datasets.base import Split
from datasets.tiles import tile_split
from engine.config.common import DataOptions
from engine.config.load import load_config, override_config, project_path
from utils.build import build, build_part, import_target, keyword_names
from utils.image import Reading
from utils.weights import load_checkpoint


def load_split(data: Mapping[str, Any], name: str) -> Split:
    """List the records of one split of the configured data set.

    Args:
        data: the ``data`` section of a config.
        name: name of a split, or the path of a text file with one image name per line, from the working
            directory, the project's root or the data set's.
    """
    if name.endswith(".txt") and not Path(name).is_file() and project_path(name).is_file():
        name = str(project_path(name))
    spec = {"target": data["source"], **(data["options"] or {})}
    if not {"root", "split"} <= (keyword_names(import_target(spec["target"])) or set()):
        raise ValueError(f"data.source '{spec['target']}' is no function of a root and a split")
    root = project_path(data["root"])
    if not root.is_dir():
        how = "tools/make_demo_data.py draws it" if data.get("generate") else "see docs/data.md"
        raise FileNotFoundError(f"data set {root} does not exist: {how}, or set data.root")
    split: Split = build(spec, root=root, split=name)
    reading = reading_of(data)
    has_background = data.get("background") is not False
    records = (replace(record, reading=reading, has_background=has_background) for record in split.records)
    split = replace(split, records=tuple(records))
    if data.get("tiles"):
        split = build_part(tile_split, dict(data["tiles"]), split, key="data.tiles")
    return split


def reading_of(data: Mapping[str, Any]) -> Reading:
    """How the pictures of a ``data`` section become RGB; checkpoints of old have no such keys."""
    value_range = data.get("value_range")
    return Reading(tuple(data.get("bands") or ()), tuple(value_range) if value_range else None)


def data_config(options: DataOptions) -> DictConfig:
    """The config of a tool's data set: ``config=FILE`` among its overrides, or that inside a checkpoint.

    Raises:
        ValueError: there is neither.
    """
    files = [item.removeprefix("config=") for item in options.overrides if item.startswith("config=")]
    if files:
        return load_config(files[-1], options.changes())
    if not options.model_path:
        raise ValueError("name the data set with config=configs/datasets/voc.yaml or --model_path CHECKPOINT")
    state = load_checkpoint(options.model_path)
    if "config" not in state:
        raise ValueError(f"{options.model_path} has no config: set config=configs/datasets/voc.yaml, ...")
    return override_config(OmegaConf.create(state["config"]), options.changes())
