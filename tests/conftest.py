"""Fixtures that the tests share: recorded reference cases and the real data next to the project."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import pytest

from tests.recorded import GOLDEN, GoldenCase, files_of

ROOT = Path(__file__).resolve().parents[1]
# The longest files begin first, so that several processes end together. Those of a line run in the same one:
# they have the weights of recorded networks in common.
FIRST = """
engine/pipeline
methods/single_stage_networks models/cnn_backbones methods/affinitynet methods/seam methods/irnet
methods/vit_steps
pretended_gpu
readme
launch
methods/published
tools/export
"""
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
    config.addinivalue_line("markers", "xdist_group(name): of tests that run in one process")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Order and groups of ``pytest -n auto --dist loadgroup --no-loadscope-reorder``."""
    places = {name: k for k, line in enumerate(FIRST.split("\n")) for name in line.split()}

    def name(item: pytest.Item) -> str:
        return item.path.relative_to(ROOT / "tests").as_posix().replace("test_", "").removesuffix(".py")

    items.sort(key=lambda item: places.get(name(item), len(places)))
    for item in items:
        item.add_marker(pytest.mark.xdist_group(str(places.get(name(item), name(item)))))


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
