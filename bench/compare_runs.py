"""Compare two trainings: python bench/compare_runs.py losses|weights FOLDER FOLDER; fails where they differ.

Losses of all logged steps may differ by 1e-4, weights not at all.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch


def losses(folder: Path) -> list[dict[str, float]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [record["loss"] for record in map(json.loads, lines) if "loss" in record]


def main(what: str, first: Path, second: Path) -> None:
    if what == "losses":
        pairs = zip(losses(first), losses(second), strict=True)
        largest = max(abs(a[name] - b[name]) for a, b in pairs for name in a)
        allowed = 1e-4
    else:
        a, b = (
            torch.load(x / "last.pth", map_location="cpu", weights_only=False)["model"]
            for x in (first, second)
        )
        largest, allowed = max((a[key].double() - b[key].double()).abs().max().item() for key in a), 0.0
    print(f"largest difference of {what}: {largest:.2g} ({allowed:g} allowed)")
    if not largest <= allowed:
        raise SystemExit(1)


if __name__ == "__main__":
    main(sys.argv[1], *map(Path, sys.argv[2:]))
