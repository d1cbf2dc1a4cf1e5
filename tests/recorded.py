"""Recorded cases: inputs and results of the authors' programs, in tests/golden or in ``--golden-dir``.

A test names its files, ``@recorded("vit_par")``, and takes the fixture ``case``. It runs once for each of
these files that is there. It fails if an entry was neither compared, used, nor named as irrelevant.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from tests.formula import Formula, formula_weight, stats

GOLDEN = Path(__file__).parent / "golden"

recorded = pytest.mark.recorded


def claimed(tests: Path = GOLDEN.parent) -> list[str]:
    """Every name in a ``@recorded(...)`` of the suite; ``*`` stands for any text."""
    texts = (path.read_text(encoding="utf-8") for path in sorted(tests.rglob("test_*.py")))
    marks = [mark for text in texts for mark in re.findall(r"^@recorded\((.*?)\)$", text, re.S | re.M)]
    return [name for mark in marks for name in re.findall(r'"([^"]+)"', mark)]


def case_name(path: Path) -> str:
    return path.stem.removesuffix("_holdout")


def files_of(folder: Path, names: tuple[str, ...]) -> list[Path]:
    """The recorded files of a folder whose names fit."""
    files = sorted(folder.glob("*.npz"))
    return [path for name in names for path in files if fnmatch(case_name(path), name)]


class GoldenCase(Formula, Mapping):
    """One recorded file: its entries as tensors, the builders of its inputs, and comparisons.

    A file may hold ``meta``, a JSON string with the prefix of its formula names and whatever shapes and
    settings differ from those of the files in tests/golden. Reading an entry marks it as used.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.name = path, case_name(path)
        with np.load(path) as file:
            arrays = {key: file[key] for key in file.files}
        self.meta: dict[str, Any] = {}
        for text in arrays.pop("meta", np.array([])).reshape(-1).tolist():
            self.meta |= json.loads(text)
        super().__init__(str(self.setting("prefix", "")))
        self.entries = {
            key: torch.from_numpy(np.array(value)) if value.dtype.kind in "biuf" else str(value)
            for key, value in arrays.items()
        }
        self.unread = set(self.entries)
        self.absent: set[str] = set()

    def __getitem__(self, key: str) -> Tensor:
        self.unread.discard(key)
        return self.entries[key]

    def __contains__(self, key: object) -> bool:
        return key in self.entries

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def tags(self) -> list[str]:
        """Names in front of the first slash, in the order of the file."""
        return list(dict.fromkeys(key.split("/")[0] for key in self.entries if "/" in key))

    def starting(self, text: str) -> list[str]:
        """Names of entries that begin with ``text``, one for each result that is stored in parts."""
        names = (key.split("__")[0] for key in self.entries if key.startswith(text))
        return list(dict.fromkeys(names))

    def irrelevant(self, *patterns: str) -> None:
        """Say that entries show nothing that could be compared."""
        self.unread = {key for key in self.unread if not any(fnmatch(key, p) for p in patterns)}

    # -- inputs

    def input(self, key: str) -> Tensor:
        """The input ``key`` of ``meta["inputs"]``: formula values, or blocks of them with noise."""
        spec, plain = self.meta["inputs"][key], Formula()
        shape, low, high = (spec[part] for part in ("shape", "low", "high"))
        name = spec.get("formula_name", spec.get("name"))
        if spec.get("kind") == "blocks":
            coarse, noise = map(self.complete, name)
            (*front, h, w), cell = shape, spec["cell"]
            x = plain.arr(coarse, (*front, -(-h // cell), -(-w // cell)), low, high)
            x = x.repeat_interleave(cell, -2).repeat_interleave(cell, -1)[..., :h, :w]
            return (x + np.float32(spec["noise"]) * plain.arr(noise, shape, -1, 1)).clip(low, high)
        x = plain.arr(self.complete(name), shape, low, high)
        if spec.get("scale") is not None:
            x = x * np.float32(spec["scale"])
        return x.to(getattr(torch, spec["astype"])) if "astype" in spec else x

    def complete(self, name: str) -> str:
        """A formula name of ``meta``: as it is where it begins with the prefix."""
        return name if name.startswith(self.prefix) else self.prefix + name

    def full_shape(self, entry: str, strides: tuple[int, ...], default: tuple[int, ...]) -> tuple[int, ...]:
        """The shape that ``entry`` was cut from with ``strides``: of ``meta``, or the default if it fits."""
        stored = self[entry].shape
        shape = tuple(self.setting(f"{entry}/shape", default))
        fits = all(-(-full // stride) == part for full, stride, part in zip(shape, strides, stored))
        return shape if fits else tuple(part * stride for part, stride in zip(stored, strides))

    def setting(self, keys: str, default: Any, tag: str = "") -> Any:
        """A value of ``meta`` at any depth, written ``a/b`` or nested; else the default.

        Args:
            keys: names that the setting may have, separated by ``|``.
            tag: a part of the case, whose own value comes first.
        """
        for key in keys.split("|"):
            for path in ((tag, key), (key, tag), (key,)) if tag else ((key,),):
                found = _find(self.meta, [_plain(part) for part in "/".join(path).split("/")])
                if _fits(found, default):
                    return tuple(found) if isinstance(default, tuple) else found
        return default

    def noted(self, pattern: str, default: Any) -> Any:
        """The first group of a pattern in the text of ``meta``, of the default's type; else the default."""
        match = re.search(pattern, json.dumps(self.meta, ensure_ascii=False).replace('\\"', '"'))
        return type(default)(match[1]) if match else default

    # -- weights

    def weight_name(self, key: str) -> str:
        """The complete formula name of a weight; notes may put more than the prefix in front."""
        front = self.setting("weight_prefix|weights_prefix", "")
        front = front or self.noted(r"""\(['"]([^'"]*)['"] ?\+ ?(?:local )?k(?:ey)?\b""", "")
        # The notes of a module spell its own place in the network too, with which the key begins.
        own = f"{key.split('.')[0]}."
        return self.complete(front + (key.removeprefix(own) if front.endswith(own) else key))

    def load_author_weights(
        self, module: nn.Module, names: Mapping[str, str], made: dict[str, Tensor] | None = None
    ) -> None:
        """Give every entry of a state dict the weight of the authors' name.

        Args:
            module: may be on ``meta``.
            names: our keys -> the authors'.
            made: weights by name, to be used again and added to: large networks take seconds.
        """
        made, state = {} if made is None else made, {}
        scales = self.setting("weight_scale", {})
        for key, value in module.state_dict().items():
            theirs = names[key]
            name = self.weight_name(theirs)
            if name not in made or made[name].shape != value.shape:
                made[name] = torch.as_tensor(formula_weight(name, value.shape)).to(value.dtype)
            scale, shift = scales.get(theirs, 1), self.meta.get(f"{theirs}_shift", 0)
            state[key] = made[name] if (scale, shift) == (1, 0) else made[name] * scale + shift
        module.load_state_dict(state, assign=any(value.is_meta for value in module.state_dict().values()))

    # -- comparisons

    def compare(
        self, entry: str, found: Any, rtol: float = 1e-5, atol: float = 1e-6, share: float = 0.0
    ) -> None:
        """Compare with an entry that is stored whole, or by every n-th value and its statistics.

        Args:
            share: of the largest recorded value, added to ``atol``.
        """
        found = torch.as_tensor(found, dtype=torch.float64).detach()
        if f"{entry}__sub" in self:
            assert list(found.shape) == self[f"{entry}__shape"].tolist(), entry
            every = int(self[f"{entry}__stride"])
            spread = torch.stack([*stats(found)[:2], found.min(), found.max(), found.abs().mean()])
            self.compare(f"{entry}__stats", spread, rtol, atol, share)
            entry, found = f"{entry}__sub", found.flatten()[::every]
        if entry not in self:
            self.absent.add(entry)
            return
        expected = self[entry].double()
        if expected.numel() == found.numel() == 1:
            found = found.reshape(expected.shape)
        atol = atol + share * expected.abs().max().item() if share else atol
        assert_close(
            found, expected, rtol=rtol, atol=atol, equal_nan=True, msg=lambda text: f"{entry}: {text}"
        )

    def same(self, entry: str, found: Any, differing: float = 0.0) -> None:
        """Compare labels and counts, of which a share may differ."""
        if entry not in self:
            self.absent.add(entry)
            return
        found, expected = torch.as_tensor(found).long(), self[entry].long()
        assert found.shape == expected.shape, entry
        assert (found != expected).double().mean() <= differing, entry

    def gradient(self, entry: str, gradient: Tensor, every: tuple[int, ...], stored: str = "") -> None:
        """Compare a gradient, stored with strides, and its statistics but the mean, which is close to 0."""
        part = gradient[tuple(slice(None, None, n) for n in every)]
        self.compare(stored or entry, part, rtol=1e-4, atol=0, share=1e-5)
        if f"{entry}_stats" in self:
            expected = self[f"{entry}_stats"][1:]
            assert_close(stats(gradient)[1:], expected, rtol=1e-4, atol=1e-6)


def _plain(key: Any) -> str:
    return re.sub(r"[^a-z0-9]", "", str(key).lower())


def _fits(found: Any, default: Any) -> bool:
    """Whether a value of ``meta`` is of the default's kind: another setting may have the same name."""
    if found is None:
        return False
    if isinstance(default, list | tuple):
        return isinstance(found, list)
    if isinstance(default, int | float):
        return isinstance(found, int | float)
    return default is None or isinstance(found, type(default))


def _find(node: Any, parts: list[str]) -> Any:
    if not isinstance(node, dict):
        return None
    plain = {_plain(key): value for key, value in node.items()}
    if "".join(parts) in plain:
        return plain["".join(parts)]
    if parts[0] in plain and len(parts) > 1 and (found := _find(plain[parts[0]], parts[1:])) is not None:
        return found
    return next((found for value in node.values() if (found := _find(value, parts)) is not None), None)
