"""The text of ``--help``: every key of a config with its value and its meaning."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from engine.config.load import load_config
from engine.config.schema import GIVEN, OPEN, keys
from utils.mappings import leaves
from utils.signature import REQUIRED, arguments


def documented_keys(name: str | Path, overrides: Sequence[str] = ()) -> list[tuple[str, Any, str]]:
    """``(dotted key, value, meaning)`` of every key of a config.

    Those of the engine are in the schema. Arguments of classes and functions have the meaning of their
    docstring, and the default where no file sets them.
    """
    cfg = load_config(name, overrides)
    rows: list[tuple[str, Any, str]] = []
    for key, (item, _) in keys().items():
        value, words = OmegaConf.select(cfg, key), ", ".join(item.metadata["choices"] or ())
        meaning = f"{words} ({item.metadata['meaning']})" if words else item.metadata["meaning"]
        if key in OPEN:
            target = OmegaConf.select(cfg, OPEN[key])
            rows += _arguments(key, OmegaConf.to_container(value), target, meaning) if target else []
        else:
            names = [stage["name"] for stage in value or ()] if key == "stages" else None
            rows.append((key, names or value, meaning))
    return rows


def describe(name: str | Path, overrides: Sequence[str] = ()) -> str:
    """Every key of a config with its value and its meaning (the text that ``--help`` prints)."""
    rows = documented_keys(name, overrides)
    lines = [f"  {f'{key} = {_typed(value)}':<56}  {meaning}" for key, value, meaning in rows]
    for stage in load_config(name, overrides).stages or []:
        lines += [
            f"  stages.{stage.name}.{key} = {_typed(value)}" for key, value in leaves(stage) if key != "name"
        ]
    return f"{name}: every key, its value and its meaning\n" + "\n".join(lines)


def _arguments(prefix: str, given: Any, target: str, meaning: str) -> Iterator[tuple[str, Any, str]]:
    """Rows of an open mapping: what the config sets, then the defaults of its target."""
    known = arguments(target) or {}
    for key, value in leaves(given):
        first = key.partition(".")[0]
        yield f"{prefix}.{key}", value, known[first].meaning if first in known else meaning
    for key, argument in known.items():
        if key not in given and key not in GIVEN and argument.default is not REQUIRED:
            yield f"{prefix}.{key}", argument.default, argument.meaning


def _typed(value: Any) -> Any:
    """A value as the command line takes it."""
    return {"None": "null", "True": "true", "False": "false"}.get(str(value), value)
