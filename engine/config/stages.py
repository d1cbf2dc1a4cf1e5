"""The stages of a pipeline: a list in a file, changed by the files that build on it and by the command line.

stages:                                  # of a list, every stage has a name
  - {name: cam_net, run: engine.train, config: irn/cam_net.yaml}
  - {name: cam, run: tools.infer_cam, model_path: "${work_dir}/cam_net/last.pth"}

stages:                                  # in a file that builds on it: by name
  cam_net: {train: {steps: 5000}}        # change
  scores: null                           # remove
  cam_train: {like: cam, infer: train}   # add: everything else as in stage "cam"
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from utils.build import suggest
from utils.mappings import merge

TRAINING = "engine.train"  # the stage whose options are a config
STAGE_KEYS = ("name", "run", "config", "like")

StageValues = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Stage:
    """One stage of a pipeline, ready to run.

    Args:
        name: of the stage and of its folder in the pipeline's ``work_dir``.
        run: import path of a module with ``run(options)``.
        options: what that function gets; of ``engine.train`` a whole config.
    """

    name: str
    run: str
    options: dict[str, Any]


def add_file(stages: StageValues, values: Any, label: str) -> StageValues:
    """Stages with what one more file says: a list replaces them, a mapping changes them by name.

    Raises:
        ValueError: for a stage without a name of its own.
        KeyError: for a change of a stage that is not there.
    """
    if isinstance(values, list):
        names = [stage.get("name") if isinstance(stage, dict) else None for stage in values]
        if wrong := [n for n in names if not re.fullmatch(r"\w+", str(n)) or n is None or names.count(n) > 1]:
            raise ValueError(f"{label}: every stage needs a name of its own (letters, digits, _): {wrong[0]}")
        return {str(name): without(stage, ("name",)) for name, stage in zip(names, values)}
    if not isinstance(values or {}, dict):
        raise ValueError(f"{label}: stages must be a list, or a mapping of names to changes")
    stages = dict(stages)
    for name, change in (values or {}).items():
        if change is None:
            stages.pop(name, None)
            continue
        if name not in stages and not {"run", "like"} & set(change):
            raise KeyError(f"{label}: unknown stage '{name}'{suggest(name, stages)}")
        stages[name] = merge(stages.get(name, {}), change)
    return stages


def take_changes(stages: StageValues, changes: Any) -> tuple[StageValues, StageValues]:
    """Stages without those that the command line sets to null, and its changes of the others.

    Raises:
        KeyError, ValueError: for a stage that is not there, or a change of its name.
    """
    where = "the command line"
    if not isinstance(changes, dict):
        raise ValueError(f"{where}: stages belong in config files, got {changes}")
    for name, change in changes.items():
        if name not in stages:
            raise KeyError(f"{where}: unknown stage '{name}'{suggest(name, stages)}")
        if change is not None and (not isinstance(change, dict) or {"name", "like"} & set(change)):
            raise ValueError(
                f"{where}: stages.{name} accepts null, stages.{name}.<key>=value sets a key; name and like "
                "belong in the config file"
            )
    removed = [name for name, change in changes.items() if change is None]
    return without(stages, removed), without(changes, removed)


def with_likes(stages: StageValues, changes: StageValues | None = None, merged: bool = False) -> StageValues:
    """Stages with the keys of those that they are like.

    Args:
        changes: of the command line. They reach the likes of a stage too, but for the keys that a like sets.
        merged: changes on top of what the files say, rather than alone.
    """
    found: StageValues = {}
    for name, values in stages.items():
        other = values.get("like")
        if other is not None and other not in found:
            raise KeyError(
                f"stage '{name}' is like '{other}', which is not a stage before it{suggest(other, found)}"
            )
        inherited, own = found[other] if other is not None else {}, without(values, ("like",))
        parts = [inherited, own] if changes is None or merged else [_unless_set(inherited, own)]
        found[name] = merge(*parts, (changes or {}).get(name, {}))
    return found


def without(values: Mapping[str, Any], keys: Sequence[str]) -> dict[str, Any]:
    """A mapping without some of its keys."""
    return {key: value for key, value in values.items() if key not in keys}


def _unless_set(values: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """``values`` without what ``own`` sets, key by key inside mappings that both have."""
    kept = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and isinstance(own.get(key), Mapping):
            kept[key] = _unless_set(value, own[key])
        elif key not in own:
            kept[key] = value
    return kept
