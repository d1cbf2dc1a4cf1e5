"""Options: each one is declared once, with type, default and meaning.

A tool's options are a dataclass of `option` fields. `command_line` fills it from flags, `fill` from a mapping
of a YAML file; both make the same checks.
"""

import dataclasses
import math
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, Field
from functools import cache, reduce
from operator import or_
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException, ValidationError

from utils.build import closest, suggest
from utils.cli import run_main
from utils.mappings import leaves

OVERRIDE = re.compile(r"^[A-Za-z_][\w.]*=")  # how key=value begins

T = TypeVar("T")


def option(
    default: Any = MISSING,
    meaning: str = "",
    *,
    free: bool | Sequence[str] = False,
    reads: bool | str | Sequence[str] = False,
    choices: Sequence[str] | None = None,
    least: float = 0,
    length: int | None = None,
    alone: str | None = None,
    positional: bool = False,
) -> Any:
    """A field of an options dataclass.

    Args:
        default: without one the option is required.
        free: it changes where and how something is computed, not what; a resumed run may change it. Of a
            mapping: those of its keys.
        reads: it is a path that must exist, or the output of an earlier stage. Of a mapping: those of its
            keys. ``"images"``: it names images, by a split, a list file or a folder.
        choices: its values, where these are few words.
        least: smallest value of a number, or of each number of a list.
        length: how many values a list has.
        alone: value of the flag without a value.
        positional: the command line gives it without a flag.
    """
    metadata = {"meaning": meaning, "free": free, "reads": reads, "choices": choices, "least": least}
    metadata |= {"length": length, "alone": alone, "positional": positional}
    if isinstance(default, (list, dict)):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@cache
def walk(cls: Any, prefix: str = "") -> Sequence[tuple[str, Field[Any], Any]]:
    """Dotted key, field and type of every option; a section comes before its options."""
    kinds, found = get_type_hints(cls), []
    for field in dataclasses.fields(cls):
        key, kind = f"{prefix}{field.name}", kinds[field.name]
        found.append((key, field, kind))
        if dataclasses.is_dataclass(kind):
            found += walk(kind, f"{key}.")  # type: ignore[arg-type]
    return found


def marked(cls: Any, mark: str) -> dict[str, Any]:
    """Dotted key -> mark of the options that are ``free`` or that the tool ``reads``."""
    found: dict[str, Any] = {}
    for key, field, _ in walk(cls):
        value = field.metadata.get(mark, False)
        if isinstance(value, (list, tuple)):
            found |= {f"{key}.{name}": True for name in value}
        elif value:
            found[key] = value
    return found


def is_below(key: str, keys: Iterable[str]) -> bool:
    """Whether a dotted key is one of ``keys``, or inside one."""
    return any(key == other or key.startswith(f"{other}.") for other in keys)


def is_text(kind: Any) -> bool:
    """Whether an option of this type takes nothing but a text, or a path, which stays as it is typed."""
    return kind is not NoneType and {*_kinds(kind)} <= {str, Path, NoneType}


def _kinds(kind: Any) -> Sequence[Any]:
    return get_args(kind) if isinstance(kind, UnionType) else (kind,)


def typed(
    cls: type, values: Mapping[str, Any], whose: Callable[[str], str] = lambda key: ""
) -> dict[str, Any]:
    """The options ``cls`` as plain values: their defaults and ``values`` on top, each of its type.

    Args:
        whose: where the value of a key comes from, the beginning of an error message.

    Raises:
        KeyError: for a key that is no option, with the closest one.
        ValueError: for a value of the wrong kind, or outside of its option's limits.
    """
    options = {key: (field, kind) for key, field, kind in walk(cls)}
    given = dict(leaves(values))
    for key, value in given.items():
        if key in options and is_text(options[key][1]) and isinstance(value, (bool, float)):
            raise ValueError(f"{whose(key)}{key} expects a text, got {value}: put it in quotes")
    try:
        plain: Any = OmegaConf.to_container(OmegaConf.merge(_defaults(cls), values), resolve=True)
    except ConfigKeyError as error:
        unknown = str(error.full_key)
        wrong = next(key for key in given if is_below(key, [unknown]))
        known = [key for key, (_, kind) in options.items() if not dataclasses.is_dataclass(kind)]
        raise KeyError(f"{whose(unknown)}'{wrong}' is not a key{suggest(wrong, known)}") from error
    except OmegaConfBaseException as error:
        key, reason = str(error.full_key).partition("[")[0], f": {str(error).splitlines()[0]}"
        if isinstance(error, ValidationError) and key in given:
            reason = f" expects {_expected(*options[key])}, got {given[key]!r}"
        raise ValueError(f"{whose(key)}{key}{reason}") from error
    for key, value in leaves(plain):
        if key in options and _is_outside(options[key][0], value):
            hint = closest(value, options[key][0].metadata["choices"] or ()) if isinstance(value, str) else ""
            raise ValueError(f"{whose(key)}{key} expects {_expected(*options[key])}, got {value!r}{hint}")
    return plain


@cache
def _defaults(cls: type) -> DictConfig:
    return OmegaConf.structured(cls)


def _is_outside(field: Field[Any], value: Any) -> bool:
    """Whether a value of the right type breaks an option's limits."""
    choices, least, length = (field.metadata[name] for name in ("choices", "least", "length"))
    items = value if isinstance(value, list) else [value]
    if isinstance(value, list) and len(items) != (length or len(items)):
        return True
    if not items:
        return not _may_be_empty(field)
    unknown = choices and isinstance(value, str) and value not in choices
    return unknown or any(isinstance(item, (int, float)) and not item >= least for item in items)


def _expected(field: Field[Any], kind: Any) -> str:
    """What an option takes, in words."""
    choices, least, length = (field.metadata[name] for name in ("choices", "least", "length"))
    limit = "" if least == -math.inf else f" from {least:g}"
    words = {int: f"a whole number{limit}", float: f"a number{limit}", bool: "true or false", Path: "a path"}
    words |= {str: " or ".join(choices or ["a text"])}
    count = f" of {length}" if length else "" if _may_be_empty(field) else " of one or more"
    return " or ".join(
        f"a list{count}, each {words[get_args(k)[0]]}" if get_origin(k) is list else words.get(k, "a mapping")
        for k in _kinds(kind)
        if k is not NoneType
    )


def _may_be_empty(field: Field[Any]) -> bool:
    """Whether a list may: only where its default is."""
    return field.default_factory is MISSING or not field.default_factory()


def fill(cls: type[T], values: Mapping[str, Any], where: str = "") -> T:
    """Options from a mapping; null means the default. Errors are those of `typed` and begin with ``where``.

    Raises:
        ValueError: a required option is missing.
    """
    where = f"{where}: " if where else ""
    given = {key: value for key, value in values.items() if value is not None}
    fields = dataclasses.fields(cls)  # type: ignore[arg-type]
    for field in fields:
        if field.default is MISSING and field.default_factory is MISSING and field.name not in given:
            raise ValueError(f"{where}the option '{field.name}' is missing: {field.metadata['meaning']}")
        if given.get(field.name) is True and field.metadata["alone"]:  # a flag without a value
            given[field.name] = field.metadata["alone"]
    found = typed(cls, given, lambda key: where)
    return cls(**{k: v.expanduser() if isinstance(v, Path) else v for k, v in found.items()})


def parse(cls: type[T], doc: str | None, arguments: Sequence[str] | None = None) -> T:
    """Options from flags and ``key=value`` items in any order; the latter become ``overrides``."""
    import tyro

    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    flags, overrides = _separate(cls, list(sys.argv[1:] if arguments is None else arguments))
    if "overrides" in fields:
        doc = f"{doc}\nFurther arguments: key=value, {fields.pop('overrides').metadata['meaning']}"
    shown = [
        (
            name,
            _flag(field, get_type_hints(cls)[name]),
            dataclasses.field(default=field.default, default_factory=field.default_factory),
        )
        for name, field in fields.items()
    ]
    given: Any = tyro.cli(
        dataclasses.make_dataclass(cls.__name__, shown, kw_only=True),
        description=re.sub(r"^python ", "    python ", doc or "", flags=re.M),  # else lines run together
        args=flags,
        use_underscores=True,
        config=(tyro.conf.FlagCreatePairsOff,),
    )
    return fill(cls, vars(given) | ({"overrides": overrides} if overrides else {}))


def command_line(cls: type[T], run: Callable[[T], object], doc: str | None) -> None:
    """Run a tool with the options of the command line."""
    run_main(lambda: run(parse(cls, doc)))


def _flag(field: Field[Any], kind: Any) -> Any:
    """What the library knows of an option."""
    import tyro

    words = field.metadata["choices"]
    kinds = [k for k in _kinds(kind) if get_origin(k) is not dict]
    shown = [
        "|".join(words) if words and k is str else k.__name__.upper() for k in kinds if k is not NoneType
    ]
    is_empty = field.default is None or (field.default_factory is not MISSING and not field.default_factory())
    about = tyro.conf.arg(
        help=field.metadata["meaning"],
        metavar="|".join(shown) if len(kinds) > 1 else None,
        help_behavior_hint="" if is_empty else None,
    )
    typed_as = [Literal[tuple(words)] if words and k is str else k for k in kinds]
    flag: Any = Annotated[reduce(or_, typed_as), about]
    return tyro.conf.Positional[flag] if field.metadata["positional"] else flag  # type: ignore[misc]


def _separate(cls: Any, arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Flags with their values, and ``key=value`` items. What follows a flag with one value is this value."""
    options = {field.name: (field, get_type_hints(cls)[field.name]) for field in dataclasses.fields(cls)}
    flags: list[str] = []
    overrides: list[str] = []
    takes_value = False
    for item, following in zip(arguments, [*arguments[1:], "--"]):
        if not takes_value and "overrides" in options and OVERRIDE.match(item):
            overrides.append(item)
            continue
        flags.append(item)
        field, kind = options.get(item.removeprefix("--").replace("-", "_"), (None, None))
        if takes_value or not item.startswith("--") or field is None:
            takes_value = False
        elif field.metadata["alone"]:
            takes_value = not (following.startswith("--") or OVERRIDE.match(following))
            flags += [] if takes_value else [field.metadata["alone"]]
        else:
            takes_value = kind is not bool and get_origin(kind) is not list
    return flags, overrides
