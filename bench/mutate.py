"""Mutation testing: change one operator or constant of the science at a time and see whether a test notices.

    python bench/mutate.py --limit 50                            a sample
    python bench/mutate.py --files losses/affinity.py --again    a file, and its survivors once more

A mutant is killed when a test file that names its module fails. Results are appended to ``--out``.
"""

import ast
import copy
import hashlib
import importlib
import importlib.util
import json
import os
import random
import re
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.machinery import ModuleSpec, SourceFileLoader
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from engine.config.options import command_line, option

FOLDERS = ("losses", "ops", "engine/scores")
TESTS = ("losses", "ops", "models", "methods")
SWAPS: dict[type[ast.AST], type[ast.AST]] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Mult, ast.Pow: ast.Mult, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd,
    ast.And: ast.Or, ast.Or: ast.And, ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.MatMult: ast.Add,
}  # fmt: skip


@dataclass(kw_only=True)
class Options:
    files: list[str] = option([], "source files; default: all of losses/, ops/ and engine/scores/")
    limit: int = option(0, "mutants to run, drawn by the seed; 0: all")
    seed: int = option(0, "of the order")
    again: bool = option(False, "run survivors of earlier runs once more")
    out: Path = option(Path("logs/mutants.jsonl"), "file of results")


class Mutant(NamedTuple):
    """One changed node of a file."""

    file: str
    number: int  # of the node among those that can be changed
    place: str  # "file:line: before -> after"
    key: str  # names the mutant as long as its file does not change


def run(options: Options) -> dict[str, int]:
    """Run mutants; returns how many were killed and how many survived, of those asked for."""
    files = options.files or [
        str(path.relative_to(ROOT)) for folder in FOLDERS for path in sorted((ROOT / folder).glob("*.py"))
    ]
    mutants = [mutant for file in files for mutant in mutants_of(file)]
    random.Random(options.seed).shuffle(mutants)
    mutants = mutants[: options.limit or None]
    known = {line["key"]: line["killed"] for line in read(options.out)}
    import_libraries()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with options.out.open("a", encoding="utf-8") as out:
        for mutant in mutants:
            if mutant.key not in known or (options.again and not known[mutant.key]):
                known[mutant.key] = is_killed(mutant)
                out.write(json.dumps({**mutant._asdict(), "killed": known[mutant.key]}) + "\n")
                out.flush()
            if not known[mutant.key]:
                print(f"survived  {mutant.place}", flush=True)
    counts = {
        "killed": sum(known[m.key] for m in mutants),
        "survived": sum(not known[m.key] for m in mutants),
    }
    share = 100 * counts["killed"] / max(len(mutants), 1)
    print(f"{counts['killed']} of {len(mutants)} mutants killed ({share:.1f} %)")
    return counts


def read(path: Path) -> list[dict[str, Any]]:
    """Results of earlier runs."""
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()] if path.is_file() else []


def mutants_of(file: str) -> Iterator[Mutant]:
    """Every mutant of a source file."""
    source = (ROOT / file).read_text("utf-8")
    tree = ast.parse(source)
    digest = hashlib.sha256(source.encode()).hexdigest()[:12]
    for number, node in enumerate(changeable(tree)):
        before = ast.unparse(node)
        after = ast.unparse(changed(copy.deepcopy(node)))
        place = f"{file}:{node.lineno}: {before} -> {after}"
        yield Mutant(file, number, place, f"{digest}:{number}")


def changeable(tree: ast.AST) -> Iterator[Any]:
    """Nodes that `changed` can change, in a fixed order; not annotations, error messages and asserts.

    Nor ``strict=True`` of zip, which is one.
    """
    if isinstance(tree, ast.keyword) and tree.arg == "strict":
        return
    if (
        (isinstance(tree, (ast.BinOp, ast.BoolOp)) and type(tree.op) in SWAPS and not _is_text(tree))
        or (isinstance(tree, ast.Compare) and type(tree.ops[0]) in SWAPS)
        or (isinstance(tree, ast.UnaryOp) and isinstance(tree.op, (ast.Not, ast.USub, ast.Invert)))
        or (isinstance(tree, ast.Constant) and isinstance(tree.value, (int, float)))
    ):
        yield tree
    for name, value in ast.iter_fields(tree):
        if name in ("annotation", "returns", "decorator_list"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST) and not isinstance(child, (ast.Raise, ast.Assert, ast.JoinedStr)):
                yield from changeable(child)


def _is_text(node: Any) -> bool:
    sides = ast.iter_child_nodes(node)
    return any(isinstance(x, ast.JoinedStr) or isinstance(getattr(x, "value", None), str) for x in sides)


def changed(node: Any) -> Any:
    """The node with another operator, or a number that is another one."""
    if isinstance(node, (ast.BinOp, ast.BoolOp)):
        node.op = SWAPS[type(node.op)]()
    elif isinstance(node, ast.Compare):
        node.ops[0] = SWAPS[type(node.ops[0])]()
    elif isinstance(node, ast.UnaryOp):
        node.op = {ast.USub: ast.UAdd, ast.Not: ast.Not, ast.Invert: ast.UAdd}[type(node.op)]()
        if isinstance(node.op, ast.Not):
            node.operand = ast.UnaryOp(ast.Not(), node.operand)
    elif isinstance(node.value, bool):
        node.value = not node.value
    else:
        node.value = node.value + 1 if isinstance(node.value, int) else 2 * node.value or 1.0
    return node


def is_killed(mutant: Mutant) -> bool:
    """Whether a test fails, or does not end, when the module is replaced.

    Raises:
        ValueError: the tests fail without any change.
    """
    return any(
        not pass_with(mutant, tests, 60 + 5 * seconds_unchanged(mutant.file, tests))
        for tests in matching_tests(mutant.file)
    )


@cache
def seconds_unchanged(file: str, tests: tuple[str, ...]) -> int:
    """How long test files take that pass, as they must without a mutant."""
    start = time.monotonic()
    if not pass_with(Mutant(file, -1, "", ""), tests, 3600):
        raise ValueError(f"the tests of {file} fail without any change")
    return int(time.monotonic() - start)


def pass_with(mutant: Mutant, tests: tuple[str, ...], timeout: int) -> bool:
    """Whether test files pass, within ``timeout`` seconds, in a process of their own."""
    process = os.fork()
    if not process:
        signal.alarm(timeout)
        os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # plugins take longer than the tests
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(1, 2)
        try:
            os._exit(_test(mutant, tests))
        finally:
            os._exit(1)
    return os.waitpid(process, 0)[1] == 0


def matching_tests(file: str) -> list[tuple[str, ...]]:
    """The test files that name a module, or else its package: those of its own folder, then all others."""
    module = file.removesuffix(".py").replace("/", ".")
    folders = (*TESTS, module.partition(".")[0])
    paths = sorted({path for folder in folders for path in (ROOT / "tests" / folder).glob("test_*.py")})
    for name in (module, module.rpartition(".")[0]):
        named = re.compile(rf"\b{re.escape(name)}\b")
        found = [path for path in paths if named.search(path.read_text("utf-8"))]
        near = tuple(str(path) for path in found if path.parent.name == module.partition(".")[0])
        others = tuple(str(path) for path in found if str(path) not in near)
        if found:
            return [tests for tests in (near, others) if tests]
    raise ValueError(f"no test file names {file}")


def _test(mutant: Mutant, tests: tuple[str, ...]) -> int:
    import pytest

    name = mutant.file.removesuffix(".py").replace("/", ".")
    path = str(ROOT / mutant.file)
    tree = ast.parse(Path(path).read_text("utf-8"))
    for number, node in enumerate(list(changeable(tree))):
        if number == mutant.number:
            changed(node)
    code = compile(ast.fix_missing_locations(tree), path, "exec")

    class Loader(SourceFileLoader):
        def get_code(self, fullname: str) -> Any:
            return code

    class Finder:
        @staticmethod
        def find_spec(fullname: str, folders: Any = None, target: Any = None) -> ModuleSpec | None:
            if fullname != name:
                return None
            return importlib.util.spec_from_file_location(name, path, loader=Loader(name, path))

    sys.meta_path.insert(0, Finder)  # type: ignore[arg-type]
    return int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", *tests]))


def import_libraries() -> None:
    """What every mutant needs and does not change."""
    for name in ("hypothesis", "omegaconf", "pytest", "timm", "torch", "torchvision.transforms.v2"):
        importlib.import_module(name)
    os.chdir(ROOT)
    importlib.import_module("torch").set_num_threads(1)


if __name__ == "__main__":
    command_line(Options, run, __doc__)
