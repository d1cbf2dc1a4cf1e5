"""Configs: YAML files with bases, ``key=value`` overrides, and refusal of keys that nobody reads.

A config file is a difference from its bases::

    base: [toco/voc.yaml, datasets/coco.yaml]     # later entries win, then this file, then the command line

engine/config/schema.py lists every key of the engine. Only the open mappings (``method``, ``data.options``,
...) take further keys, and those must be arguments of the class or function they configure. A config with
``stages`` is a pipeline (engine/config/stages.py, docs/pipelines.md).
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from functools import cache, reduce
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from engine.config.options import OVERRIDE, convert, is_text
from engine.config.schema import GIVEN, OPEN, defaults, keys
from engine.config.stages import (
    STAGE_KEYS,
    TRAINING,
    Stage,
    StageValues,
    add_file,
    take_changes,
    with_likes,
    without,
)
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
    """The file of a config name: as given, in the folder ``beside`` it, below the project's root, or below
    ``configs/``.

    Raises:
        FileNotFoundError: if there is none; lists the configs that exist.
    """
    near = () if beside is None else (beside / name,)
    for candidate in (Path(name), *near, ROOT / name, CONFIGS / name):
        if candidate.is_file():
            return candidate.resolve()
    known = sorted(str(p.relative_to(ROOT)) for p in CONFIGS.rglob("*.yaml"))
    raise FileNotFoundError(f"unknown config '{name}'{suggest(str(name), known)}")


def config_chain(path: Path, _inside: tuple[Path, ...] = ()) -> list[Path]:
    """The files that make up a config, bases before what builds on them."""
    if path in _inside:
        raise ValueError(f"configs are bases of each other: {' -> '.join(p.name for p in (*_inside, path))}")
    bases = _read(path).get("base", [])
    bases = [bases] if isinstance(bases, str) else bases
    chain = [
        file for base in bases for file in config_chain(find_config(base, path.parent), (*_inside, path))
    ]
    return list(dict.fromkeys([*chain, path]))


def load_config(name: str | Path, overrides: Sequence[str] = ()) -> DictConfig:
    """Merge a config file with its bases, the engine's defaults and ``key=value`` overrides.

    Raises:
        FileNotFoundError: if the file or one of its bases does not exist.
        KeyError: for a key that nothing reads, with the closest one that exists.
        ValueError: for a value of the wrong kind, an override that is not ``key=value``, or damaged YAML.
    """
    layers = _read_layers(name, overrides)
    merged = _compose(layers.files, [(COMMAND_LINE, layers.changes)])
    if layers.stages:
        stages = with_likes(layers.stages, layers.stage_changes, merged=True)
        merged.stages = [{"name": key, **values} for key, values in stages.items()]
        if OmegaConf.is_missing(merged.method, "target"):  # each of its trainings has a method of its own
            del merged.method["target"]
    if merged.run_name is None:
        is_ours = layers.path.parent.parent.name == "configs"  # configs/<method>/<data>.yaml
        merged.run_name = f"{layers.path.parent.name}_{layers.path.stem}" if is_ours else layers.path.stem
    return _checked(merged, _label(layers.path), [key for key, _ in leaves(layers.changes)])


def load_stages(name: str | Path, overrides: Sequence[str] = ()) -> list[Stage]:
    """The stages of a pipeline with everything that concerns them merged.

    A training stage gets, later ones win: its ``config``, the sections (``data``, ``train``, ...) of the
    pipeline's files, its own keys, ``key=value`` of the command line, ``stages.<name>.key=value``. Other
    stages get their own keys and ``stages.<name>.key=value``. ``like: <stage>`` takes over the keys of
    another one first.

    Raises:
        As `load_config`; ValueError for a config without stages, and for a stage without ``run``.
    """
    cfg, layers = load_config(name, overrides), _read_layers(name, overrides)
    if not layers.stages:
        raise ValueError(f"{_label(layers.path)} has no stages: it is a single training")
    own = _resolved(cfg, with_likes(layers.stages))
    last_word = _resolved(cfg, with_likes(layers.stages, layers.stage_changes))
    together: dict[str, Any] = {}
    for _, values in layers.files:
        together = _build_on(together, values)
    shared = (_label(layers.path), without(together, ("run_name", "work_dir")))
    everywhere = without(layers.changes, ("run_name", "work_dir"))
    loaded = []
    for stage, values in own.items():
        where = f"stage '{stage}' of {_label(layers.path)}"
        options, changed = (without(v, STAGE_KEYS) for v in (values, last_word[stage]))
        what = {**values, **last_word[stage]}  # run, config
        if not what.get("run"):
            raise ValueError(f"{where} needs run, for example run: tools.infer_cam")
        if what["run"] != TRAINING:
            loaded.append(Stage(stage, str(what["run"]), merge(options, changed)))
            continue
        if not what.get("config"):
            raise ValueError(f"{where} needs config, for example config: cam/voc.yaml")
        files = [(_label(f), _values_of(f)) for f in config_chain(find_config(what["config"]))]
        composed = _compose([*files, shared], [(where, options), (COMMAND_LINE, merge(everywhere, changed))])
        composed.run_name, composed.work_dir = f"{cfg.run_name}_{stage}", f"{cfg.work_dir}/{stage}"
        loaded.append(Stage(stage, TRAINING, to_plain(_checked(composed, where))))
    return loaded


def override_config(cfg: DictConfig, overrides: Sequence[str]) -> DictConfig:
    """Apply ``key=value`` to a config that is complete already, such as that of a checkpoint.

    Raises:
        As `load_config`.
    """
    changes = _parse_overrides(overrides, to_plain(cfg))
    _check_keys(changes, {}, COMMAND_LINE, known=[key for key, _ in leaves(to_plain(cfg))])
    return _checked(
        OmegaConf.create(merge(to_plain(cfg), changes)),
        "the checkpoint's config",
        [key for key, _ in leaves(changes)],
    )


def to_plain(cfg: DictConfig) -> dict[str, Any]:
    """The resolved config as plain dicts and lists, for checkpoints and files."""
    return OmegaConf.to_container(cfg, resolve=True)  # type: ignore[return-value]


Layer = tuple[str, Mapping[str, Any]]


class _Layers(NamedTuple):
    path: Path
    files: list[Layer]
    stages: StageValues
    changes: dict[str, Any]
    stage_changes: StageValues


def _read_layers(name: str | Path, overrides: Sequence[str]) -> _Layers:
    """The parts of a config: values and stages of its files, and the command line's changes of both."""
    path = find_config(name)
    files: list[Layer] = []
    stages: StageValues = {}
    for file in config_chain(path):
        values = _values_of(file)
        stages = add_file(stages, values.pop("stages", None), _label(file))
        files.append((_label(file), values))
    changes = _parse_overrides(overrides, merge(*(values for _, values in files)))
    stages, stage_changes = take_changes(stages, changes.pop("stages", {}))
    return _Layers(path, files, stages, changes, stage_changes)


def _compose(files: Sequence[Layer], changes: Sequence[Layer]) -> DictConfig:
    """Defaults, then files, then changes; a key that nothing reads is refused."""
    merged = defaults()
    for label, values in files:
        merged = _build_on(merged, values)
        _check_keys(values, None, label)
    for label, values in changes:
        known = [key for key, _ in leaves(merged)]
        merged = merge(merged, values)
        _check_keys(values, merged, label, known)
    return OmegaConf.create(merged)


def _build_on(base: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """A file merged with its base. One with a data source of its own drops the options of the base's."""
    source = _select(values, "data.source")
    if source is not None and source != _select(base, "data.source"):
        base = {**base, "data": {**base.get("data", {}), "options": {}}}
    return merge(base, values)


def _resolved(cfg: DictConfig, stages: StageValues) -> StageValues:
    """Stages with ``${...}`` replaced by values of the pipeline's config."""
    whole = OmegaConf.create({**to_plain(cfg), "stages": stages})
    try:
        return OmegaConf.to_container(whole.stages, resolve=True)  # type: ignore[return-value]
    except OmegaConfBaseException as error:
        raise ValueError(f"stages: {error}") from error


def _checked(cfg: DictConfig, source: str, changed: Iterable[str] = ()) -> DictConfig:
    """The config with ``${...}`` replaced and every value of its type.

    Args:
        source: what errors name, but for the keys in ``changed``, which come from the command line.
    """
    changed = set(changed)
    try:
        plain = to_plain(cfg)
    except OmegaConfBaseException as error:
        raise ValueError(f"{source}: {error}") from error
    for key, (item, kind) in keys().items():
        *sections, name = key.split(".")
        section = reduce(dict.__getitem__, sections, plain)
        if section.get(name, "???") != "???":
            where = f"{COMMAND_LINE if key in changed else source}: {key}"
            section[name] = convert(item, kind, section[name], where)
    if ".." in Path(plain["run_name"] or "").parts:
        raise ValueError(
            f"{source}: run_name must be a folder name below logs/ (set work_dir for another place)"
        )
    # Stages name folders below it, which tools open as they are.
    plain["work_dir"] = os.path.expanduser(plain["work_dir"])
    return OmegaConf.create(plain)


def _check_keys(
    values: Mapping[str, Any], merged: Mapping[str, Any] | None, source: str, known: Sequence[str] = ()
) -> None:
    """Refuse keys that are neither in the schema nor, on the command line, arguments of an open mapping's
    target.
    """
    for key, _ in leaves(values):
        if key in keys() or any(name.startswith(f"{key}.") for name in keys()):
            continue
        free = next(
            (k for k, (_, kind) in keys().items() if key.startswith(f"{k}.") and "dict" in str(kind)), None
        )
        if free is None:
            raise KeyError(f"{source}: '{key}' is not a key{suggest(key, [*keys(), *known])}")
        found = merged and free in OPEN and arguments(str(_select(merged, OPEN[free])))
        first = key.removeprefix(f"{free}.").partition(".")[0]
        if found and first not in (*found, "target"):
            names = [f"{free}.{name}" for name in found if name not in GIVEN]
            raise KeyError(f"{source}: '{free}.{first}' is not a key{suggest(f'{free}.{first}', names)}")


def _select(values: Any, key: str) -> Any:
    """The value of a dotted key of nested mappings; None without it."""
    for part in key.split("."):
        values = values.get(part) if isinstance(values, Mapping) else None
    return values


def _values_of(path: Path) -> dict[str, Any]:
    """What a file says itself."""
    return without(_read(path), ("base",))


def _label(path: Path) -> str:
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


def _read(path: Path) -> Mapping[str, Any]:
    """What a file holds; it is parsed again only after a change, for many configs share their bases."""
    status = path.stat()
    return _parsed(path, status.st_mtime_ns, status.st_size)


@cache
def _parsed(path: Path, mtime_ns: int, size: int) -> Mapping[str, Any]:
    text = path.read_text(encoding="utf-8")
    try:  # by OmegaConf, which reads 1e-4 as a number, as people mean it; plain YAML calls it a text
        values = OmegaConf.create(text)
        plain = OmegaConf.to_container(values)
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise ValueError(f"{_label(path)} is not valid YAML: {error}") from error
    if not isinstance(plain, dict) or not all(isinstance(key, str) for key in plain):
        raise ValueError(f"{_label(path)} is not a mapping of keys to values")
    try:
        return _with_texts(plain, yaml.load(text, Loader=yaml.BaseLoader))
    except ValueError as error:
        raise ValueError(f"{_label(path)}: {error}") from error


def _with_texts(values: Any, texts: Any, prefix: str = "") -> Any:
    """Values of text options as the file has them: 010 and 12:30 are numbers to YAML. Refuses dotted keys."""
    found = {}
    for key, value in values.items():
        if "." in str(key):
            nested = key.replace(".", ": {") + ": ..." + "}" * key.count(".")
            raise ValueError(f"'{key}' is the form of the command line; in a file it is nested: {nested}")
        item = keys().get(f"{prefix}{key}")
        if item and is_text(item[1]) and value is not None and not isinstance(value, (list, dict)):
            value = texts[key]
        elif key == "stages" and isinstance(value, list):
            pairs = zip(value, texts[key])
            value = [_with_texts(*pair) if isinstance(pair[0], dict) else pair[0] for pair in pairs]
        elif isinstance(value, dict):
            value = _with_texts(value, texts[key], "" if prefix == "stages." else f"{prefix}{key}.")
        found[key] = value
    return found


def _parse_overrides(overrides: Sequence[str], values: Mapping[str, Any]) -> dict[str, Any]:
    """Nested mapping of ``key=value`` items; what a text option is set to stays as it was typed.

    Args:
        values: of the config, which name the targets of open mappings.
    """
    changes = OmegaConf.create()
    for item in overrides:
        if not OVERRIDE.match(item):
            raise ValueError(f"'{item}' is not key=value, for example train.steps=100 (all keys: --help)")
        key, _, text = item.partition("=")
        try:
            if text != "null" and _is_text_key(key, values, is_list=text.startswith("[")):
                OmegaConf.update(changes, key, text, force_add=True)
                continue
            changes.merge_with_dotlist([item])
            number = OmegaConf.select(changes, key)
            if type(number) is int and str(number) != text:  # to YAML 010, 12:30 and 2024_01 are numbers
                OmegaConf.update(changes, key, text)
        except (yaml.YAMLError, OmegaConfBaseException) as error:
            raise ValueError(f"cannot read the override {item}: {error}") from error
    return OmegaConf.to_container(changes)  # type: ignore[return-value]


def _is_text_key(key: str, values: Mapping[str, Any], is_list: bool = False) -> bool:
    """Whether a key takes a text: by the schema, or by the annotation in its target's signature."""
    parts = key.split(".")
    key = ".".join(parts[2:] if parts[0] == "stages" else parts)
    if key in keys():
        return is_text(keys()[key][1])
    prefix, _, name = key.rpartition(".")
    found = prefix in OPEN and arguments(str(_select(values, OPEN[prefix])))
    kinds = found[name].annotation.split(" | ") if found and name in found else []
    texts = {"str", "Path", "None"} | (set() if is_list else {"Sequence[str]"})
    return bool(kinds) and set(kinds) <= texts
