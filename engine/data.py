"""From the ``data`` section of a config to splits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from datasets.base import Split
from engine.config.load import project_path
from utils.build import build


def load_split(data: Mapping[str, Any], name: str) -> Split:
    """List the records of one split of the configured data set.

    Args:
        data: the ``data`` section of a config.
        name: name of a split, or the path of a text file with one image name per line.
    """
    spec = {"target": data["source"], **(data["options"] or {})}
    return build(spec, root=project_path(data["root"]), split=name)
