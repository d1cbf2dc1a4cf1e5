"""Fixtures that the tests share: recorded reference cases and the real data next to the project."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.formula import Formula
from utils.memory import keep_freed_memory

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = ROOT / "tests" / "golden"
DATA = Path(os.environ.get("TAG2MASK_SHARED", ROOT.parent / "shared")) / "data"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--golden-dir",
        type=Path,
        default=None,
        help="folder with other recorded cases of the same form: NAME.npz or NAME_holdout.npz",
    )


def pytest_configure() -> None:
    keep_freed_memory()  # as every entry point does


class GoldenCase(Formula, Mapping):
    """One recorded file: its entries as tensors, and the builders of its inputs.

    A file may hold ``meta``, a JSON string with the prefix of its formula names and whatever shapes and seeds
    differ from those of the files in tests/golden.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with np.load(path) as file:
            arrays = {key: file[key] for key in file.files}
        meta = arrays.pop("meta", None)
        self.meta: dict[str, Any] = {}
        for text in () if meta is None else meta.reshape(-1).tolist():
            self.meta |= json.loads(text)
        super().__init__(str(self.setting("prefix", "")))
        self.entries = {key: _tensor(value) for key, value in arrays.items()}

    def __getitem__(self, key: str) -> Tensor:
        return self.entries[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def tags(self) -> list[str]:
        """Names in front of the first slash, in the order of the file."""
        return list(dict.fromkeys(key.split("/")[0] for key in self.entries if "/" in key))

    def input(self, key: str) -> Tensor:
        """The input ``key`` as ``meta["inputs"]`` describes it: name, shape, range and, if given, type."""
        recipe = self.meta["inputs"][key]
        values = self.arr(recipe["name"], recipe["shape"], recipe["low"], recipe["high"])
        return values.to(getattr(torch, recipe["astype"])) if "astype" in recipe else values

    def full_shape(self, entry: str, strides: tuple[int, ...], default: tuple[int, ...]) -> tuple[int, ...]:
        """The shape that ``entry`` was cut from with ``strides``: of ``meta``, or the default if it fits."""
        stored = self[entry].shape
        shape = tuple(self.setting(f"{entry}/shape", default))
        fits = all(-(-full // stride) == part for full, stride, part in zip(shape, strides, stored))
        return shape if fits else tuple(part * stride for part, stride in zip(stored, strides))

    def setting(self, key: str, default: Any) -> Any:
        """A value of ``meta`` at any depth, written ``a/b`` or nested; else the default."""

        def find(node: Any, parts: list[str]) -> Any:
            if isinstance(node, dict):
                lower = {str(k).lower(): v for k, v in node.items()}
                if "/".join(parts).lower() in lower:
                    return lower["/".join(parts).lower()]
                if parts[0].lower() in lower and len(parts) > 1:
                    return find(lower[parts[0].lower()], parts[1:])
                for value in node.values():
                    if (found := find(value, parts)) is not None:
                        return found
            return None

        found = find(self.meta, key.split("/"))
        return default if found is None else found


def _tensor(value: np.ndarray) -> Tensor:
    return torch.from_numpy(np.array(value)) if value.dtype.kind in "biuf" else value


@pytest.fixture
def golden(request: pytest.FixtureRequest):
    """``golden(name)``: the recorded case ``name``; with --golden-dir the one in that folder."""
    folder: Path | None = request.config.getoption("--golden-dir")

    def load(name: str) -> GoldenCase:
        if folder is None:
            return GoldenCase(GOLDEN / f"{name}.npz")
        for path in (folder / f"{name}_holdout.npz", folder / f"{name}.npz"):
            if path.is_file():
                return GoldenCase(path)
        pytest.skip(f"{folder} has no {name}")

    return load


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
