"""Configs: YAML files that are differences from their bases, and ``key=value`` of the command line on top.

base: [toco/voc.yaml, datasets/coco.yaml]     # later entries win, then this file, then the command line
"""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from omegaconf import MISSING, DictConfig, OmegaConf

from engine.config.options import OVERRIDE, is_below, is_text, typed
from engine.config.schema import OPEN, Config, keys
from engine.config.stages import STAGE_KEYS, TRAINING, Stage, StageValues, add_stages, with_likes, without
from utils.build import suggest
from utils.mappings import leaves, merge
from utils.signature import arguments

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "configs"
COMMAND_LINE = "the command line"


def project_path(path: str | Path) -> Path:
    """A path from a config: absolute, or relative to the project's root whatever the working directory."""
    path = Path(path).expanduser()
    return path if path.is_absolute() else (ROOT / path).resolve()


def find_config(name: str | Path, beside: Path | None = None) -> Path:
    """The file of a config name: as given, in ``beside``, below the project's root, or below ``configs/``."""
    for candidate in (Path(name), (beside or ROOT) / name, ROOT / name, CONFIGS / name):
        if candidate.is_file():
            return candidate.resolve()
    known = sorted(str(p.relative_to(ROOT)) for p in CONFIGS.rglob("*.yaml"))
    inside = [file for file in known if Path(name).name in Path(file).parts[1:-1]]  # of a folder
    hint = f": it is a folder with {', '.join(inside)}" if inside else suggest(str(name), known)
    raise FileNotFoundError(f"unknown config '{name}'{hint}")


def config_chain(path: Path, inside: tuple[Path, ...] = ()) -> dict[Path, dict[str, Any]]:
    """What each file that makes up a config says itself, bases before what builds on them."""
    if path in inside:
        raise ValueError(f"configs are bases of each other: {' -> '.join(p.name for p in (*inside, path))}")
    values = _read(path)
    bases = values.pop("base", [])
    chain: dict[Path, dict[str, Any]] = {}
    for base in [bases] if isinstance(bases, str) else bases:
        chain |= config_chain(find_config(base, path.parent), (*inside, path))
    return chain | {path: values}


def load_config(name: str | Path, overrides: Sequence[str] = ()) -> DictConfig:
    """Merge a config file with its bases, the engine's defaults and ``key=value`` overrides.

    Raises:
        FileNotFoundError, KeyError: a file or a key that does not exist, with the closest one.
        ValueError: a value of the wrong kind, an override that is not ``key=value``, or damaged YAML.
    """
    parts = _read_parts(name, overrides)
    layers = [*parts.files, (COMMAND_LINE, parts.changes)]
    if parts.stages:
        stages = [{"name": stage, **values} for stage, values in with_likes(parts.stages).items()]
        layers.append((_label(parts.path), {"stages": stages}))
    return _compose(layers, parts.path)


def load_stages(name: str | Path, overrides: Sequence[str] = ()) -> list[Stage]:
    """The stages of a pipeline with everything that concerns them merged.

    A training stage gets, later ones win: its ``config``, the sections (``data``, ``train``, ...) of the
    pipeline's files, its own keys, ``key=value`` of the command line, ``stages.<name>.key=value``. Other
    stages get their own keys and ``stages.<name>.key=value``. ``like: <stage>`` takes over the keys of
    another one first, those of the command line too. Raises as `load_config`.
    """
    cfg, parts = load_config(name, overrides), _read_parts(name, overrides)
    label, plain = _label(parts.path), to_plain(cfg)
    if not parts.stages:
        raise ValueError(f"{label} has no stages: it is a single training")
    own_folder = ("run_name", "work_dir")
    shared = [(where, without(values, own_folder)) for where, values in parts.files]
    everywhere = without(parts.changes, own_folder)
    last_word: Any = to_plain(OmegaConf.create({**plain, "stages": parts.stage_changes}))["stages"]
    loaded = []
    for values in plain["stages"]:
        stage, options = values["name"], without(values, STAGE_KEYS)
        where = f"stage '{stage}' of {label}"
        if not values.get("run"):
            raise ValueError(f"{where} needs run, for example run: tools.infer_cam")
        if values["run"] == TRAINING:
            if not values.get("config"):
                raise ValueError(f"{where} needs config, for example config: cam/voc.yaml")
            path = find_config(values["config"])
            own = without(last_word.get(stage) or {}, STAGE_KEYS)
            folder = {"run_name": f"{cfg.run_name}_{stage}", "work_dir": f"{cfg.work_dir}/{stage}"}
            layers = [(_label(file), content) for file, content in config_chain(path).items()]
            layers += [*shared, (where, options), (COMMAND_LINE, everywhere)]
            layers += [(f"{COMMAND_LINE}, stage '{stage}'", own), (where, folder)]
            options = to_plain(_compose(layers, path))
        loaded.append(Stage(stage, str(values["run"]), options))
    return loaded


def override_config(cfg: DictConfig, overrides: Sequence[str]) -> DictConfig:
    """Apply ``key=value`` to a config that is complete already, such as that of a checkpoint."""
    values = to_plain(cfg)
    for key in [key for key, _ in leaves(values) if not is_below(key, keys())]:  # of another version
        section, _, name = key.rpartition(".")
        del (_select(values, section) if section else values)[name]
    changes = _parse_overrides(overrides, values)
    return _compose([("the checkpoint's config", values), (COMMAND_LINE, changes)])


def to_plain(cfg: DictConfig) -> dict[str, Any]:
    """The resolved config as plain dicts and lists, for checkpoints and files."""
    return OmegaConf.to_container(cfg, resolve=True)  # type: ignore[return-value]


class _Parts(NamedTuple):
    """A config: values of its files, its stages, and what the command line changes of both."""

    path: Path
    files: list[tuple[str, dict[str, Any]]]
    stages: StageValues
    changes: dict[str, Any]
    stage_changes: StageValues


def _read_parts(name: str | Path, overrides: Sequence[str]) -> _Parts:
    path = find_config(name)
    files = [(_label(file), values) for file, values in config_chain(path).items()]
    changes = _parse_overrides(overrides, merge(*(values for _, values in files)))
    stages: StageValues = {}
    for label, values in [*files, (COMMAND_LINE, changes)]:
        if "stages" in values:
            stages = add_stages(stages, values["stages"], label)
    stage_changes = changes.get("stages", {})
    files = [(label, without(values, ("stages",))) for label, values in files]
    return _Parts(path, files, stages, without(changes, ("stages",)), stage_changes)


def _compose(layers: Sequence[tuple[str, Mapping[str, Any]]], path: Path | None = None) -> DictConfig:
    """The engine's defaults with layers of values on top, complete and checked.

    Args:
        path: of the config file, which names the run.
    """
    merged: dict[str, Any] = {}
    for _, values in layers:
        source = _select(values, "data.source")
        if source is not None and source != _select(merged, "data.source"):  # which has options of its own
            merged = {**merged, "data": {**merged.get("data", {}), "options": {}}}
        merged = merge(merged, values)
    if path and merged.get("run_name") is None:
        is_ours = path.parent.parent.name == "configs"  # configs/<method>/<data>.yaml
        merged["run_name"] = f"{path.parent.name}_{path.stem}" if is_ours else path.stem

    def whose(key: str) -> str:
        whole = key.partition("[")[0]
        found = [label for label, values in layers if any(is_below(k, [whole]) for k, _ in leaves(values))]
        return f"{found[-1]}: " if found else ""

    plain = typed(Config, merged, whose)
    if plain["stages"] and plain["method"].get("target") == MISSING:  # each of its trainings has its own
        del plain["method"]["target"]
    if ".." in Path(plain["run_name"] or "").parts:
        raise ValueError("run_name must be a folder name below logs/ (set work_dir for another place)")
    # Stages name folders below it, which tools open as they are.
    plain["work_dir"] = os.path.expanduser(plain["work_dir"])
    return OmegaConf.create(plain)


def _select(values: Any, key: str) -> Any:
    """The value of a dotted key of nested mappings; None without it."""
    for part in key.split("."):
        values = values.get(part) if isinstance(values, Mapping) else None
    return values


def _label(path: Path) -> str:
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


class _Loader(yaml.SafeLoader):
    """YAML in which 1e-4 is a number, and 010, 12:30, 2024_01, yes and dates are texts; keys differ."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if twice := {key for key in keys if keys.count(key) > 1}:
            raise yaml.YAMLError(f"the key '{min(twice)}' is there twice, {node.start_mark}")
        if dotted := [key for key in keys if "." in key]:
            raise yaml.YAMLError(f"'{dotted[0]}' must be nested: train: {{steps: 1}}, {node.start_mark}")
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern in (
    ("null", r"null|"),
    ("bool", r"true|false"),
    ("int", r"-?(0|[1-9]\d*)"),
    ("float", r"[-+]?(\d+\.\d*|\.\d+|\d+(?=e))(e[-+]?\d+)?|[-+]?\.inf"),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), None)


def _read(path: Path) -> dict[str, Any]:
    """What a file says."""
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"{_label(path)} is not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{_label(path)} is not a mapping of keys to values")
    return values


def _parse_overrides(overrides: Sequence[str], values: Mapping[str, Any]) -> dict[str, Any]:
    """Nested mapping of ``key=value`` items; what a text option is set to stays as it was typed.

    Args:
        values: of the config, which name the targets of open mappings.
    """
    changes: dict[str, Any] = {}
    for item in overrides:
        if not OVERRIDE.match(item):
            raise ValueError(f"'{item}' is not key=value, for example train.steps=100 (all keys: --help)")
        key, _, text = item.partition("=")
        try:
            value = yaml.load(text, Loader=_Loader)
        except yaml.YAMLError as error:
            if not _is_text_key(key, values):
                raise ValueError(f"cannot read the override {item}: {error}") from error
            value = text
        if isinstance(value, str) or (
            not isinstance(value, list) and text != "null" and _is_text_key(key, values)
        ):
            value = text
        for part in reversed(key.split(".")):
            value = {part: value}
        changes = merge(changes, value)
    return changes


def _is_text_key(key: str, values: Mapping[str, Any]) -> bool:
    """Whether a key takes a text: by the schema, or by the annotation in its target's signature."""
    key = re.sub(r"^stages\.\w+\.", "", key)
    if key in keys():
        return is_text(keys()[key][1])
    prefix, _, name = key.rpartition(".")
    target = prefix in OPEN and _select(values, OPEN[prefix])  # a pipeline has none
    found = target and arguments(str(target))
    kinds = set(found[name].annotation.split(" | ")) if found and name in found else {""}
    return kinds <= {"str", "Path", "None", "Sequence[str]"}
