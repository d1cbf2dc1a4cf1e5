"""Imports point down only: scripts, tools > engine > methods > datasets, models, losses > ops > utils."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MAY_IMPORT = {
    "utils": {"utils"},
    "ops": {"ops", "utils"},
    "losses": {"losses", "ops", "utils"},
    "models": {"models", "ops", "utils"},
    "datasets": {"datasets", "utils"},
    "methods": {"methods", "datasets", "models", "losses", "ops", "utils"},
    "engine": {"engine", "methods", "datasets", "models", "losses", "ops", "utils"},
}
OURS = {*MAY_IMPORT, "scripts", "tools"}


def imported_packages(file: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found.add(node.module.split(".")[0])
    return found


@pytest.mark.parametrize("layer", MAY_IMPORT)
def test_imports_point_down_only(layer):
    files = list((ROOT / layer).rglob("*.py"))
    assert files
    upwards = {
        str(file.relative_to(ROOT)): wrong
        for file in files
        if (wrong := (imported_packages(file) & OURS) - MAY_IMPORT[layer])
    }
    assert not upwards


@pytest.mark.parametrize("layer", MAY_IMPORT)
def test_no_config_object_below_the_engine(layer):
    """Config stops at the builder: a signature documents what a thing needs."""
    users = {f.name for f in (ROOT / layer).rglob("*.py") if "omegaconf" in imported_packages(f)}
    assert layer == "engine" or not users


def test_science_loads_no_framework_but_torch():
    modules = "losses.affinity, losses.tag_contrast, ops.labels, ops.pairs, models.refiners.base"
    heavy = "{'omegaconf', 'timm', 'torchvision'}"
    code = f"import sys, {modules}; print({heavy} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "set()"


def test_engine_names_no_method():
    """A method is one file and one config: nothing above it lists methods."""
    named = {p.stem for p in (ROOT / "methods").glob("*.py")}
    named -= {"__init__", "base", "published", "vit_base", "cnn_base"}
    for file in (ROOT / "engine").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("methods."):
                assert node.module.split(".")[1] not in named, f"{file.name} imports {node.module}"


def test_entry_files_put_the_root_on_the_path():
    for folder in ("scripts", "tools"):
        for file in (ROOT / folder).glob("*.py"):
            text = file.read_text()
            imports = re.findall(r"^\s*(?:from|import) (\w+)", text, flags=re.MULTILINE)
            if "__main__" in text and OURS & set(imports):
                assert "sys.path.insert(0, str(Path(__file__).resolve().parents[1]))" in text, file
