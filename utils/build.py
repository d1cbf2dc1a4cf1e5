"""Objects from configs: a mapping with a ``target`` import path becomes a call with keyword arguments."""

import difflib
import importlib
import inspect
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any


def closest(word: str, known: Iterable[str]) -> str:
    """``": did you mean 'x'?"`` for the closest known word; empty when none is close."""
    close = difflib.get_close_matches(word, sorted(known), n=1, cutoff=0.6)
    return f": did you mean '{close[0]}'?" if close else ""


def suggest(word: str, known: Iterable[str]) -> str:
    """``closest``, or the list of known words when none is close."""
    known = sorted(known)
    return closest(word, known) or f"; known: {', '.join(known)}"


def import_target(path: str) -> Any:
    """The class or function at a dotted import path; an ImportError names what is missing."""
    module_name, _, name = path.rpartition(".")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        # Only the named module itself may be missing; a broken import inside it keeps its own message.
        if error.name is None or not module_name.startswith(error.name):
            raise
        raise ImportError(f"unknown module '{module_name}' of target '{path}'") from error
    except ValueError as error:
        raise ImportError(f"target '{path}' is not an import path such as 'methods.toco.ToCo'") from error
    if not hasattr(module, name):
        public = (n for n in vars(module) if not n.startswith("_"))
        raise ImportError(f"module '{module_name}' has no '{name}'{suggest(name, public)}")
    return getattr(module, name)


def import_class(path: str, base: type) -> Any:
    """The class at an import path, which a stranger's checkpoint may name: never a function to be called."""
    target = import_target(path)
    if not inspect.isclass(target) or not issubclass(target, base):
        raise ValueError(f"'{path}' is no {base.__name__}")
    return target


def keyword_names(target: Any) -> set[str] | None:
    """Names of the keyword arguments of a callable, over all base classes; None when it takes any keyword."""
    if isinstance(target, partial):  # without what it gives by position
        given = list(inspect.signature(target.func).parameters)[: len(target.args)]
        accepted = keyword_names(target.func)
        return None if accepted is None else accepted - set(given)
    parameters = inspect.signature(target).parameters.values()
    names = {p.name for p in parameters if p.kind is not p.VAR_KEYWORD}
    if len(names) == len(parameters):
        return names
    if not inspect.isclass(target):
        return None
    # A class that passes **kwargs on takes what its base takes.
    return names | (
        keyword_names(next(cls for cls in target.__mro__[1:] if "__init__" in vars(cls))) or set()
    )


def build(spec: Mapping[str, Any], **extra: Any) -> Any:
    """Call ``spec["target"]`` with the other entries of ``spec`` and ``extra`` as keyword arguments."""
    arguments = {key: value for key, value in spec.items() if key != "target"} | extra
    target = import_target(spec["target"])
    _check_names(target, arguments, spec["target"])
    return target(**arguments)


def build_part(
    target: Any, options: Mapping[str, Any] | None, *args: Any, key: str, others: Iterable[str] = ()
) -> Any:
    """Call ``target(*args, **options)``, a part of a method whose options are at ``key`` of its config.

    Args:
        others: further names that may be there, for the message.
    """
    part = partial(target, *args)
    _check_names(part, options or {}, key, others)
    return part(**(options or {}))


def check_number(key: str, value: Any, least: float = 0.0, most: float = 1.0) -> None:
    """Raise a ValueError that names the key if ``value`` is no number from ``least`` to ``most``."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value <= most:
        limits = f"from {least:g} to {most:g}" if most != float("inf") else f"from {least:g}"
        raise ValueError(f"{key} must be a number {limits}, got {value!r}")


def check_choice(key: str, value: Any, choices: Iterable[str]) -> None:
    """Raise a ValueError that names the key if ``value`` is none of the choices."""
    if value not in (known := list(choices)):
        raise ValueError(f"{key} is {' or '.join(known)}, not {value!r}")


def _check_names(target: Any, arguments: Iterable[str], whose: str, others: Iterable[str] = ()) -> None:
    known = keyword_names(target)
    for name in arguments:
        if known is not None and name not in known:
            raise KeyError(f"'{name}' is not an argument of {whose}{suggest(name, known.union(others))}")
