"""Compare two trainings: python bench/compare_runs.py losses|weights FOLDER FOLDER; fails where they differ.

Losses of all logged steps may differ by 1e-4, weights not at all.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from engine.config.options import command_line, option


@dataclass(kw_only=True)
class Options:
    """What is compared."""

    what: str = option(meaning="what to compare", choices=("losses", "weights"), positional=True)
    first: Path = option(meaning="a run folder", positional=True)
    second: Path = option(meaning="another one", positional=True)


def losses(folder: Path) -> list[dict[str, float]]:
    """Those of every logged step."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [record["loss"] for record in map(json.loads, lines) if "loss" in record]


def run(options: Options) -> None:
    """Print the largest difference; exits with 1 where it is not allowed."""
    from utils.weights import load_checkpoint

    if options.what == "losses":
        pairs = zip(losses(options.first), losses(options.second), strict=True)
        largest = max(abs(a[name] - b[name]) for a, b in pairs for name in a)
        allowed = 1e-4
    else:
        a, b = (load_checkpoint(x / "last.pth")["model"] for x in (options.first, options.second))
        largest, allowed = max((a[key].double() - b[key].double()).abs().max().item() for key in a), 0.0
    print(f"largest difference of {options.what}: {largest:.2g} ({allowed:g} allowed)")
    if not largest <= allowed:
        raise SystemExit(1)


if __name__ == "__main__":
    command_line(Options, run, __doc__)
