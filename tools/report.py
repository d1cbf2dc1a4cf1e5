"""One page for runs: curves, scores, classes, confusion, tag errors, and what each run saw in images.

    python tools/report.py logs/seco_0 logs/seco_1 logs/toco_0 --out comparison.html

Runs that differ in their seed alone are a group, shown as mean with 95 % interval. A training writes the page
of its own run at each validation: logs/<run>/report.html.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from engine.config.options import command_line, option


@dataclass(kw_only=True)
class Options:
    runs: list[Path] = option(meaning="run folders", positional=True)
    out: Path | None = option(None, "the page; default: report.html beside one run, or in this folder")
    title: str | None = option(None, "headline; default: the run's name")


def run(options: Options) -> Path:
    """Write the page; returns its path."""
    from engine.report import REPORT, write_report

    if not options.runs:
        raise ValueError("name one or more run folders; tools/runs.py lists them")
    folder = options.runs[0] if len(options.runs) == 1 else Path()
    path = write_report(options.runs, options.out or folder / REPORT, options.title)
    print(path)
    return path


if __name__ == "__main__":
    command_line(Options, run, __doc__)
