"""The runs below logs/: method, data, steps, state, scores with their protocol, seconds per step, memory.

python tools/runs.py                    runs of one config together, with mean and 95 % interval
python tools/runs.py logs/demo --csv    those of a folder, as a table for other programs
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from engine.config.options import command_line, option


@dataclass(kw_only=True)
class Options:
    folders: list[Path] = option([], "folders with runs, at any depth; default: logs/", positional=True)
    json: bool = option(False, "print JSON")
    csv: bool = option(False, "print CSV, a line for each run and protocol")


def run(options: Options) -> list[dict[str, Any]]:
    """Print the runs; returns a row for each."""
    from engine.config.load import project_path
    from engine.runs import find_runs, grouped

    if missing := [str(folder) for folder in options.folders if not folder.is_dir()]:
        raise FileNotFoundError(f"there is no folder {', '.join(missing)}")
    groups = grouped(find_runs(options.folders or [project_path("logs")]))
    rows = [row(member, title) for title, members in groups.items() for member in members]
    if options.json:
        import json

        print(json.dumps(rows, indent=1))
    elif options.csv:
        print_csv(rows)
    elif rows:
        print_tables(rows)
    else:
        print("no runs")
    return rows


def row(run: Any, group: str) -> dict[str, Any]:
    """What is known of a run, plain; scores are mIoU in percent by protocol id."""
    from engine.runs import percent

    results = run.results().items()
    scores = {protocol: {key: percent(item) for key, item in found.items()} for protocol, found in results}
    return {
        "group": group, "run": str(run.folder), "method": run.method, "data": run.data,
        "seed": run.config.get("seed"), "step": run.step, "steps": run.steps, "state": run.state,
        **{key: run.last(key) for key in ("seconds_per_step", "gpu_memory_mib")},
        "best_step": run.best_step, "scores": scores,
    }  # fmt: skip


def print_tables(rows: list[dict[str, Any]]) -> None:
    """The runs, and the scores of each group."""
    from engine.runs import interval_text
    from engine.scores.tables import text_table

    header = ["run", "method", "data", "seed", "step", "state", "s/step", "GPU MiB"]
    lines, scores = [], {}
    for item in rows:
        lines.append(
            [
                item["run"], item["method"], item["data"], _shown(item["seed"]),
                f"{item['step']}/{item['steps']}", item["state"], _shown(item["seconds_per_step"], "{:.2f}"),
                _shown(item["gpu_memory_mib"], "{:.0f}"),
            ]
        )  # fmt: skip
        for protocol, found in item["scores"].items():
            scores.setdefault((protocol, item["group"]), []).append(found)
    print(text_table(header, lines))
    lines = []
    for (protocol, group), found in sorted(scores.items()):
        values = {key: [v[key] for v in found if v.get(key) is not None] for key in ("last", "best")}
        shown = [interval_text(values[key]) if values[key] else "-" for key in values]
        lines.append([protocol, group, str(len(found)), *shown])
    if lines:
        print("\nmIoU %, mean and 95 % interval over runs of one config")
        print(text_table(["protocol", "config", "runs", "last step", "best.pth"], lines))


def print_csv(rows: list[dict[str, Any]]) -> None:
    """A line for each run and protocol; one for a run without scores."""
    import csv

    fields = [*(key for key in rows[0] if key != "scores"), "protocol", "last", "best"] if rows else []
    writer = csv.DictWriter(sys.stdout, fields, lineterminator="\n")
    writer.writeheader()
    for item in rows:
        about = {key: value for key, value in item.items() if key != "scores"}
        for protocol, found in (item["scores"] or {"": {}}).items():
            writer.writerow({**about, "protocol": protocol, **found})


def _shown(value: Any, form: str = "{}") -> str:
    return "-" if value is None else form.format(value)


if __name__ == "__main__":
    command_line(Options, run, __doc__)
