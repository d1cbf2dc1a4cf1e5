"""The arguments of a class or function, read from its source without importing it."""

import ast
import re
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

REQUIRED = "???"
ROOT = Path(__file__).resolve().parents[1]

Definition = ast.ClassDef | ast.FunctionDef


class Argument(NamedTuple):
    """A keyword argument: its default, its annotation as text, and its docstring entry."""

    default: Any
    annotation: str
    meaning: str


@cache
def arguments(target: str) -> dict[str, Argument] | None:
    """Keyword arguments of an import path, over the base classes.

    None for a target that is not found, that takes any keyword, or that is made by a call.
    """
    module, _, name = target.rpartition(".")
    node = _find(module, name)
    if node is None or (isinstance(node[1], ast.FunctionDef) and node[1].args.kwarg):
        return None
    found: dict[str, Argument] = {}
    takes_more = True
    for part in _with_bases(*node):
        inits = [x for x in part.body if isinstance(x, ast.FunctionDef) and x.name == "__init__"]
        init = part if isinstance(part, ast.FunctionDef) else inits[0] if inits else None
        doc = "\n".join(ast.get_docstring(x) or "" for x in (part, *inits))
        for key, argument in _of_function(init, doc) if init else _of_fields(part, doc):
            if key in found:  # the class itself comes first; a base has the text where it has none
                found[key] = found[key]._replace(meaning=found[key].meaning or argument.meaning)
            elif takes_more:
                found[key] = argument
        takes_more = takes_more and (init is None or init.args.kwarg is not None)
    return found


def _find(module: str, name: str) -> tuple[str, Definition] | None:
    """The definition of a name, through imports of it from other modules."""
    tree = _tree(module)
    for node in tree.body if tree else ():
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and node.name == name:
            return module, node
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    return _find(node.module, alias.name)
    return None


@cache
def _tree(module: str) -> ast.Module | None:
    for folder in (ROOT, *map(Path, sys.path)):
        path = folder.joinpath(*module.split("."))
        for file in (path.with_suffix(".py"), path / "__init__.py"):
            if module and file.is_file():
                return ast.parse(file.read_text(encoding="utf-8"))
    return None


def _with_bases(module: str, node: Definition) -> Iterator[Definition]:
    """A function alone, or a class and its bases, nearest first."""
    yield node
    for base in node.bases if isinstance(node, ast.ClassDef) else ():
        if isinstance(base, ast.Name) and (found := _find(module, base.id)):
            yield from _with_bases(*found)


def _of_function(node: ast.FunctionDef, doc: str) -> Iterator[tuple[str, Argument]]:
    arguments = node.args
    named = [*arguments.posonlyargs, *arguments.args]
    values = [None] * (len(named) - len(arguments.defaults)) + arguments.defaults  # type: ignore[operator]
    for argument, value in zip([*named, *arguments.kwonlyargs], [*values, *arguments.kw_defaults]):
        if argument.arg != "self":
            yield argument.arg, _argument(argument.arg, argument.annotation, value, doc)


def _of_fields(cls: Definition, doc: str) -> Iterator[tuple[str, Argument]]:
    """Fields of a dataclass."""
    if any("dataclass" in ast.unparse(decorator) for decorator in cls.decorator_list):
        for node in cls.body:
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                yield node.target.id, _argument(node.target.id, node.annotation, node.value, doc)


def _argument(name: str, annotation: ast.expr | None, default: ast.expr | None, doc: str) -> Argument:
    # "name: meaning", or "name, other: meaning" of several together.
    entry = rf"^\s*(?:\w+, )*{name}(?:, \w+)*:\s(.*(?:\n\s{{8,}}.*)*)"
    match = re.search(entry, doc, flags=re.MULTILINE)
    try:
        value = REQUIRED if default is None else ast.literal_eval(default)
    except ValueError:  # a name or a call
        value = REQUIRED
    value = list(value) if isinstance(value, tuple) else value
    kind = ast.unparse(annotation) if annotation else ""
    return Argument(value, kind, " ".join(match[1].split()) if match else "")
