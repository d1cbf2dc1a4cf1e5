"""Fixtures that the tests share: recorded reference cases and the real data next to the project."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import pytest

from tests.recorded import GOLDEN, GoldenCase, files_of

ROOT = Path(__file__).resolve().parents[1]
# Files that take longest, in order of their time: they begin first, so that several processes end together.
LONGEST = (
    "methods/test_single_stage_networks.py", "engine/test_pipeline.py", "methods/test_vit_steps.py",
    "test_pretended_gpu.py", "test_launch.py", "test_readme.py", "methods/test_published.py",
    "tools/test_export.py", "methods/test_affinitynet.py", "test_demo.py",
)  # fmt: skip
DATA = Path(os.environ.get("TAG2MASK_SHARED", ROOT.parent / "shared")) / "data"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--golden-dir",
        type=Path,
        default=GOLDEN,
        help="folder with other recorded cases of the same form: NAME.npz or NAME_holdout.npz",
    )
    parser.addoption("--all", action="store_true", help="promises at length too (docs/reliability.md)")


@pytest.fixture
def at_length(request: pytest.FixtureRequest) -> bool:
    """Whether promises are tested at length: more kills, steps and batches."""
    return request.config.getoption("--all")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "recorded(*names): runs once for each of these files of --golden-dir")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {ROOT / "tests" / file: place for place, file in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path, len(LONGEST)))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if mark := metafunc.definition.get_closest_marker("recorded"):
        files = files_of(metafunc.config.getoption("--golden-dir"), mark.args)
        metafunc.parametrize("case", files, ids=[path.stem for path in files], indirect=True)


@pytest.fixture
def case(request: pytest.FixtureRequest) -> GoldenCase:
    """A file of the test's mark ``recorded``."""
    return GoldenCase(request.param)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item):
    """A test of a recorded case reads all of it."""
    result = yield
    if item.get_closest_marker("recorded"):
        case = item.funcargs["case"]
        if case.absent and case.path.parent != GOLDEN:
            warnings.warn(f"{case.path.name} does not record {', '.join(sorted(case.absent))}", stacklevel=1)
        assert not case.unread, f"{case.path.name}: nothing reads {', '.join(sorted(case.unread))}"
    return result


@pytest.fixture
def voc20_mini() -> Path:
    """880 real photos with 20 VOC classes, in VOC layout."""
    return _present(DATA / "voc20_mini")


@pytest.fixture
def deit_tiny() -> Path:
    """ImageNet weights of DeiT-tiny."""
    return _present(DATA / "weights" / "deit_tiny_patch16_224_fp16.safetensors")


def _present(path: Path) -> Path:
    if not path.exists():
        pytest.skip(f"{path} is not on this machine")
    return path
