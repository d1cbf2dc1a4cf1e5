"""The stages of a pipeline: a list in a file, changed by the files that build on it and by the command line.

docs/pipelines.md has the forms: a list of stages with names, or a mapping of names to changes, ``null`` or
``like``.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from utils.build import suggest
from utils.mappings import merge

TRAINING = "engine.train"  # the stage whose options are a config
STAGE_KEYS = ("name", "run", "config")

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


def add_stages(stages: StageValues, values: Any, label: str) -> StageValues:
    """Stages with what one more source says: a list replaces them, a mapping changes them by name.

    Raises:
        ValueError: for a stage without a name of its own.
        KeyError: for a change of a stage that is not there.
    """
    if isinstance(values, list):
        names = [stage.get("name") if isinstance(stage, dict) else None for stage in values]
        if wrong := [n for n in names if not re.fullmatch(r"\w+", str(n)) or n is None or names.count(n) > 1]:
            raise ValueError(f"{label}: every stage needs a name of its own (letters, digits, _): {wrong[0]}")
        return {str(name): without(stage, ("name",)) for name, stage in zip(names, values)}
    if not isinstance(values, dict) or not all(isinstance(v, dict | None) for v in values.values()):
        raise ValueError(f"{label}: stages must be a list, or a mapping of names to changes, got {values}")
    stages = dict(stages)
    for name, change in values.items():
        if name not in stages and not {"run", "like"} & set(change or ()):
            raise KeyError(f"{label}: unknown stage '{name}'{suggest(name, stages)}")
        stages[name] = merge(stages.get(name, {}), change or {})
        if change is None:
            del stages[name]
    return stages


def with_likes(stages: StageValues) -> StageValues:
    """Stages with the keys of those that they are like."""
    found: StageValues = {}
    for name, values in stages.items():
        other = values.get("like")
        if other is not None and other not in found:
            raise KeyError(f"stage '{name}' is like '{other}', no stage before it{suggest(other, found)}")
        found[name] = merge(found.get(str(other), {}), without(values, ("like",)))
    return found


def without(values: Mapping[str, Any], keys: Sequence[str]) -> dict[str, Any]:
    """A mapping without some of its keys."""
    return {key: value for key, value in values.items() if key not in keys}
