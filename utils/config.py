"""Configs: YAML files with bases, ``key=value`` overrides, and refusal of keys that nobody reads.

A config file is a difference from its bases::

    base: [toco/voc.yaml, datasets/coco.yaml]     # later entries win, then this file, then the command line

``configs/default.yaml`` lists every key of the engine; only the open mappings (``method``, ``data.options``,
...) take further keys, and those must be arguments of the class or function they configure.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from utils.build import import_target, keyword_names, suggest

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "configs"

# Mappings whose keys belong to a class or function: where its import path stands, and which arguments the
# engine gives.
OPEN = {"method": "method.target", "data.options": "data.source", "data.generate": "data.generate.target"}
GIVEN = {"num_classes", "class_prior", "root", "split"}


def project_path(path: str | Path) -> Path:
    """A path from a config: absolute, or relative to the project's root whatever the working directory."""
    path = Path(path).expanduser()
    return path if path.is_absolute() else (ROOT / path).resolve()


def find_config(name: str | Path) -> Path:
    """The file of a config name: as given, below the project's root, or below ``configs/``.

    Raises:
        FileNotFoundError: if there is none; lists the configs that exist.
    """
    for candidate in (Path(name), ROOT / name, CONFIGS / name):
        if candidate.is_file():
            return candidate.resolve()
    known = sorted(str(p.relative_to(ROOT)) for p in CONFIGS.rglob("*.yaml"))
    raise FileNotFoundError(f"there is no config '{name}'{suggest(str(name), known)}")


def config_chain(path: Path, _inside: tuple[Path, ...] = ()) -> list[Path]:
    """The files that make up a config, bases before what builds on them."""
    if path in _inside:
        raise ValueError(f"configs are bases of each other: {' -> '.join(p.name for p in (*_inside, path))}")
    bases = _read(path).get("base", [])
    bases = [bases] if isinstance(bases, str) else bases
    chain = [file for base in bases for file in config_chain(find_config(base), (*_inside, path))]
    return list(dict.fromkeys([*chain, path]))


def load_config(name: str | Path, overrides: Sequence[str] = ()) -> DictConfig:
    """Merge a config file with its bases, the engine's defaults and ``key=value`` overrides.

    Raises:
        FileNotFoundError: if the file or one of its bases does not exist.
        KeyError: for a key that nothing reads, with the closest one that exists.
        ValueError: for an override that is not ``key=value``, or YAML that does not parse.
    """
    path = find_config(name)
    merged = _merge(OmegaConf.load(CONFIGS / "default.yaml"))
    for file in config_chain(path):
        values = {key: value for key, value in _read(file).items() if key != "base"}
        merged = _merge(merged, values)
        _check_keys(values, merged, _label(file))
    changes = _parse_overrides(overrides)
    # An override that builds on nothing is a typing error: it would be saved and never read.
    merged_with = _merge(merged, changes)
    _check_keys(changes, merged_with, "the command line", existing=merged)
    if merged_with.run_name is None:
        merged_with.run_name = (
            f"{path.parent.name}_{path.stem}" if path.is_relative_to(CONFIGS) else path.stem
        )
    try:
        OmegaConf.resolve(merged_with)
    except OmegaConfBaseException as error:
        raise ValueError(f"{_label(path)}: {error}") from error
    return merged_with


def to_plain(cfg: DictConfig) -> dict[str, Any]:
    """The resolved config as plain dicts and lists, for checkpoints and files."""
    return OmegaConf.to_container(cfg, resolve=True)  # type: ignore[return-value]


def documented_keys(name: str | Path) -> list[tuple[str, Any, str]]:
    """``(dotted key, value, meaning)`` of every key of a config.

    The meaning is the comment behind the key in the YAML files; for arguments of classes and functions that
    no file sets, it is their docstring's, and the value is the default.
    """
    path = find_config(name)
    cfg = load_config(path)
    meanings: dict[str, str] = {}
    for file in [CONFIGS / "default.yaml", *config_chain(path)]:
        meanings |= _comments(file)
    for prefix, target in _targets(cfg):
        for key, (default, text) in _argument_docs(target).items():
            if key in GIVEN:
                continue
            meanings.setdefault(f"{prefix}.{key}", text)
            if OmegaConf.select(cfg, f"{prefix}.{key}") is None and default is not _REQUIRED:
                OmegaConf.update(cfg, f"{prefix}.{key}", default, force_add=True)
    rows = []
    for key, value in _leaves(OmegaConf.to_container(cfg)):
        parent = key
        while parent and not meanings.get(parent):
            parent = parent.rpartition(".")[0]
        rows.append((key, value, meanings.get(parent, "")))
    return rows


def describe(name: str | Path) -> str:
    """Every key of a config with its value and its meaning (the text that ``--help`` prints)."""
    lines = [f"  {f'{key} = {value}':<56}  {meaning}" for key, value, meaning in documented_keys(name)]
    return f"{_label(find_config(name))}: every key, its value and its meaning\n" + "\n".join(lines)


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """``key: old -> new`` for every leaf in which two plain configs differ."""
    before, after = dict(_leaves(old)), dict(_leaves(new))
    keys = [*before, *(key for key in after if key not in before)]
    return [f"{k}: {before.get(k)} -> {after.get(k)}" for k in keys if before.get(k) != after.get(k)]


def _merge(*parts: Any) -> DictConfig:
    merged = OmegaConf.merge(*parts)
    assert isinstance(merged, DictConfig)
    return merged


def _read(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text()) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"{_label(path)} is not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{_label(path)} is not a mapping of keys to values")
    return values


def _label(path: Path) -> str:
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


def _parse_overrides(overrides: Sequence[str]) -> DictConfig:
    for item in overrides:
        if not re.match(r"^[A-Za-z_][\w.]*=", item):
            raise ValueError(f"'{item}' is not key=value, for example train.steps=100 (all keys: --help)")
    try:
        return OmegaConf.from_dotlist(list(overrides))
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise ValueError(f"cannot read the overrides {list(overrides)}: {error}") from error


def _leaves(values: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted key and value of everything that is not a non-empty mapping."""
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _targets(cfg: DictConfig) -> Iterator[tuple[str, Any]]:
    """Open mappings of the config with the class or function that reads each."""
    for prefix, where in OPEN.items():
        path = OmegaConf.select(cfg, where)
        if path:
            yield prefix, import_target(path)


def _check_keys(
    values: Mapping[str, Any] | DictConfig,
    merged: DictConfig,
    source: str,
    existing: DictConfig | None = None,
) -> None:
    """Refuse keys of ``values`` that are neither in default.yaml nor arguments of an open mapping's
    target.
    """
    default = dict.fromkeys(
        key for key, _ in _leaves(OmegaConf.to_container(OmegaConf.load(CONFIGS / "default.yaml")))
    )
    known_here = default | (
        dict(_leaves(OmegaConf.to_container(existing, resolve=False))) if existing else {}
    )
    arguments = (
        {prefix: keyword_names(target) for prefix, target in _targets(merged)} if existing is not None else {}
    )
    if isinstance(values, DictConfig):
        values = OmegaConf.to_container(values, resolve=False)  # type: ignore[assignment]
    for key, _ in _leaves(values):
        prefix = next((p for p in OPEN if key == p or key.startswith(p + ".")), None)
        if prefix is None:
            if key not in default and not any(known.startswith(key + ".") for known in default):
                raise KeyError(f"{source}: '{key}' is not a key{suggest(key, known_here)}")
        elif key != prefix and arguments.get(prefix) is not None:
            first = key.removeprefix(prefix + ".").split(".")[0]
            allowed = arguments[prefix] | {"target"}  # type: ignore[operator]
            if first not in allowed:
                names = [f"{prefix}.{name}" for name in allowed - GIVEN]
                raise KeyError(
                    f"{source}: '{prefix}.{first}' is not a key{suggest(f'{prefix}.{first}', names)}"
                )


def _comments(path: Path) -> dict[str, str]:
    """The comment behind each key of a YAML file, by dotted key."""
    found: dict[str, str] = {}
    stack: list[tuple[int, str]] = []
    for line in path.read_text().splitlines():
        match = re.match(r"^(\s*)([A-Za-z_]\w*):(?:\s(.*?))??(?:\s+#\s(.*))?$", line)
        if not match:
            continue
        indent, key, _, comment = match.groups()
        while stack and stack[-1][0] >= len(indent):
            stack.pop()
        stack.append((len(indent), key))
        if comment:
            found[".".join(name for _, name in stack)] = comment.strip()
    return found


_REQUIRED = object()


def _argument_docs(target: Any) -> dict[str, tuple[Any, str]]:
    """Default and docstring text of the arguments of a class (over its bases) or function."""
    found: dict[str, tuple[Any, str]] = {}
    for part in (
        [c for c in target.__mro__ if c.__module__.startswith("methods")]
        if inspect.isclass(target)
        else [target]
    ):
        parameters = inspect.signature(part).parameters.values()
        text = "\n".join(
            filter(None, [inspect.getdoc(part), inspect.getdoc(getattr(part, "__init__", None))])
        )
        for parameter in parameters:
            if parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
                continue
            match = re.search(rf"^\s*{parameter.name}:\s(.*(?:\n\s{{8,}}.*)*)", text, flags=re.MULTILINE)
            default = _REQUIRED if parameter.default is parameter.empty else parameter.default
            plain = default is _REQUIRED or isinstance(
                default, (int, float, str, bool, list, tuple, dict, type(None))
            )
            meaning = " ".join(match.group(1).split()) if match else ""
            # The class itself comes before its bases: its default counts, and their text where it has none.
            if parameter.name in found:
                default, known = found[parameter.name]
                found[parameter.name] = (default, known or meaning)
                continue
            found[parameter.name] = (
                list(default) if isinstance(default, tuple) else default if plain else _REQUIRED,
                meaning,
            )
    return found
