"""One page for one run or many: ``report.html``, which needs no server, no data set and no other file."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jinja2 import Environment, FileSystemLoader
from torch import Tensor

from datasets.lists import HOLE
from engine.runs import Run, grouped, interval, interval_text, load_run, percent
from engine.scores.miou import matrix_of
from engine.seen import overlays
from utils.drawing import PALETTE
from utils.files import write_atomic
from utils.logging import MetricsWriter, warn_once
from utils.mappings import leaves
from utils.schedule import Schedule

REPORT = "report.html"
TITLES = {"seg": "segmentation", "cam": "CAM", "aux_cam": "auxiliary CAM"}
WIDTH, HEIGHT, LEFT, BOTTOM, MARGIN = (
    340,
    180,
    52,
    20,
    14,
)  # of a chart, in its own units
Point = tuple[float, float]  # step, threshold or strength, and value


class Member(NamedTuple):
    """A run on a page."""

    run: Run
    group: str  # title of the runs with its config
    colour: int  # the same for all of a group


@dataclass
class Chart:
    """Lines over steps, or over another number."""

    title: str
    lines: list[tuple[int, str, list[Point]]] = field(default_factory=list)  # colour, name, points
    marks: list[tuple[int, float]] = field(default_factory=list)  # colour, place
    notes: list[str] = field(default_factory=list)  # what the marks mean
    axis: str = "step"


def write_report(folders: Iterable[Path], out: Path, title: str | None = None, note: str = "") -> Path:
    """`write_page` of some run folders.

    Raises:
        FileNotFoundError: a folder holds nothing of a run.
    """
    return write_page([load_run(folder) for folder in folders], out, title, note)


def write_page(
    runs: Sequence[Run],
    out: Path,
    title: str | None = None,
    note: str = "",
    charts: Mapping[str, Sequence[Chart]] | None = None,
) -> Path:
    """Write the page of some runs.

    Args:
        title: default: the run's name, or how many runs there are.
        note: text with line breaks for its head.
        charts: sections that follow it, by their titles.
    """
    groups = grouped(runs)
    members = [Member(run, name, i) for i, (name, group) in enumerate(groups.items()) for run in group]
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    helpers = {"place": place, "path": path_of, "band": band_of, "ticks": ticks, "number": "{:.4g}".format}
    environment.globals |= helpers
    text = environment.get_template("report_page.html").render(
        title=title or (runs[0].name if len(runs) == 1 else f"{len(runs)} runs"),
        note=note,
        members=members,
        groups=groups,
        scores=list(score_rows(members)),
        charts=charts or {},
        sections=[
            ("Scores over steps", score_charts(members)),
            ("Losses and more", loss_charts(members)),
        ],
        sweeps=sweep_charts(members),
        bars=list(class_bars(members)),
        matrices=list(matrices(members)),
        tag_errors=list(tag_errors(members)),
        differences=config_differences(groups),
        images=list(image_rows(members)),
        size={"width": WIDTH, "height": HEIGHT, "left": LEFT, "bottom": BOTTOM, "margin": MARGIN},
    )
    write_atomic(out, text.encode())
    return out


def refresh(folder: Path, writer: MetricsWriter, step: int) -> None:
    """After a validation: pictures for TensorBoard and the page of the run; its errors end no training."""
    try:
        run = load_run(folder)
        write_page([run], folder / REPORT)
        for split, content in run.seen.items():
            writer.draw(step, {f"{split}/{name}": picture for name, picture in overlays(content)})
    except Exception as error:
        warn_once(f"{folder / REPORT} is not written: {type(error).__name__}: {error}")


# Numbers


def score_rows(members: Sequence[Member]) -> Iterator[dict[str, Any]]:
    """mIoU of every protocol and group."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for run, group, colour in members:
        for protocol, records in run.results().items():
            row = found.setdefault((protocol, group), {"colour": colour, "last": [], "best": []})
            for key in ("last", "best"):
                if (value := percent(records.get(key))) is not None:
                    row[key].append(value)
    for (protocol, group), row in sorted(found.items(), key=lambda item: (item[0][0], item[1]["colour"])):
        if not row["last"]:
            continue
        mean, half = interval(row["last"])
        texts = {f"{key}_text": interval_text(row[key]) if row[key] else "-" for key in ("last", "best")}
        yield {"protocol": protocol, "group": group, "mean": mean, "half": half or 0, **row, **texts}


def score_charts(members: Sequence[Member]) -> list[Chart]:
    """A chart for each score of the validations."""
    charts: dict[str, Chart] = {}
    for run, _, colour in members:
        for name in dict.fromkeys(name for _, scores in run.validations for name in scores):
            found = [(float(step), scores.get(name)) for step, scores in run.validations]
            points = [(step, value) for step, value in found if value is not None]
            chart = charts.setdefault(name, Chart(f"{name} %"))
            chart.lines.append((colour, run.name, points))
    for chart in charts.values():
        _mark(chart, members, lambda name: True)
    return list(charts.values())


def loss_charts(members: Sequence[Member]) -> list[Chart]:
    """A chart for each loss (unweighted), metric, the learning rate and the time of a step."""
    charts: dict[str, Chart] = {}
    for run, _, colour in members:
        series: dict[str, list[Point]] = {}
        for line in run.lines:
            kept = {key: line[key] for key in ("loss", "metrics", "lr", "seconds_per_step") if key in line}
            for key, value in leaves(kept):
                if isinstance(value, (int, float)):
                    series.setdefault(key.replace(".", " "), []).append((line["step"], value))
        for name, points in series.items():
            charts.setdefault(name, Chart(name)).lines.append((colour, run.name, points))
    for title, chart in charts.items():
        kind, _, loss = title.partition(" ")
        if kind == "loss":
            _mark(chart, members, lambda name, loss=loss: name == loss)  # type: ignore[misc]
            idle = [run.name for run, _, _ in members if not _is_trained(run, loss)]
            if len(idle) == len(members):
                chart.notes.append("weight 0 so far: not trained")
    order = {"loss": 0, "metrics": 1}
    return sorted(charts.values(), key=lambda chart: order.get(chart.title.partition(" ")[0], 2))


def schedules(config: Mapping[str, Any]) -> Iterator[tuple[str, list[tuple[int, Any]]]]:
    """What changes during a training: name of a loss or key of the method, and its changes."""
    for key, value in leaves(config.get("method", {})):
        pairs = isinstance(value, list) and all(isinstance(v, list) and len(v) == 2 for v in value)
        if pairs and len(value) > 1:
            yield key.removeprefix("loss_weights."), [(step, new) for step, new in value[1:]]


def _is_trained(run: Run, loss: str) -> bool:
    """Whether a loss had a weight at a step that was made."""
    weights = run.config.get("method", {}).get("loss_weights")
    if not weights:  # the method has its own
        return True
    schedule = Schedule(weights.get(loss, 0))
    return any(value and start < run.step for start, value in zip(schedule.starts, schedule.values))


def _mark(chart: Chart, members: Sequence[Member], wanted: Callable[[str], bool]) -> None:
    steps = max((points[-1][0] for _, _, points in chart.lines if points), default=0)
    notes: dict[int, list[str]] = {}
    for run, _, colour in members:
        for name, changes in schedules(run.config):
            for step, value in changes:
                if wanted(name) and step <= steps:
                    chart.marks.append((colour, step))
                    notes.setdefault(step, []).append(f"{name} {value}")
    chart.marks = sorted(set(chart.marks))
    chart.notes = [f"from {step}: {', '.join(dict.fromkeys(names))}" for step, names in sorted(notes.items())]


def sweep_charts(members: Sequence[Member]) -> list[Chart]:
    """mIoU of CAMs over background thresholds, a chart for each split and output."""
    charts: dict[str, Chart] = {}
    for run, _, colour in members:
        for split, content in run.seen.items():
            for output, values in content.get("sweep", {}).items():
                points = [(i / 100, value) for i, value in enumerate(values)]
                name = f"{TITLES[output]} mIoU %, {split}"
                chart = charts.setdefault(name, Chart(name, axis="threshold"))
                chart.lines.append((colour, run.name, points))
    return list(charts.values())


def class_bars(members: Sequence[Member]) -> Iterator[dict[str, Any]]:
    """IoU of every class by protocol: the mean over the runs of a group."""
    found: dict[str, dict[str, dict[str, list[float]]]] = {}
    for run, group, _ in members:
        for protocol, records in run.results().items():
            for name, values in records["last"]["score"].get("per_class", {}).items():
                if values.get("iou") is not None:
                    groups = found.setdefault(protocol, {}).setdefault(name, {})
                    groups.setdefault(group, []).append(100 * values["iou"])
    colours = {group: colour for _, group, colour in members}
    for protocol, classes in found.items():
        rows = [
            (name, [(colours[group], group, interval(values)[0]) for group, values in groups.items()])
            for name, groups in classes.items()
        ]
        yield {"protocol": protocol, "rows": rows}


def matrices(members: Sequence[Member]) -> Iterator[dict[str, Any]]:
    """Confusion of classes by run and protocol, and which tags occur together; rows in percent."""
    for run, _, _ in members:
        names = run.info.get("class_names") or [
            name for content in list(run.seen.values())[:1] for name in content["class_names"]
        ]
        for protocol, records in run.results().items():
            if "matrix" in records["last"]["score"]:
                counts = matrix_of(records["last"]["score"]).double()
                title, about = (
                    f"{run.name}: {protocol}",
                    "rows: truth, columns: prediction, % of a row's pixels",
                )
                if len(names) == len(counts):
                    yield {"title": title, "about": about, **_of_classes(names, _row_percent(counts))}
    drawn = set()
    for run, _, _ in members:
        pairs, key = run.info.get("pairs"), run.info.get("data_fingerprint")
        if pairs and key not in drawn:
            drawn.add(key)
            counts = torch.tensor(pairs, dtype=torch.float64)
            shares = _row_percent(counts, counts.diagonal()[:, None])
            about = "of the training images with the row's tag, % that also have the column's"
            names = run.info["class_names"][1:]
            yield {"title": f"tags of {run.data}", "about": about, **_of_classes(names, shares)}


def _of_classes(names: Sequence[str], rows: list[list[float]]) -> dict[str, Any]:
    kept = [k for k, name in enumerate(names) if name != HOLE]
    return {"names": [names[k] for k in kept], "rows": [[rows[k][j] for j in kept] for k in kept]}


def _row_percent(counts: Tensor, total: Tensor | None = None) -> list[list[float]]:
    total = counts.sum(1, keepdim=True) if total is None else total
    return [[round(v, 1) for v in row] for row in (100 * counts / total.clamp(min=1)).tolist()]


def tag_errors(members: Sequence[Member]) -> Iterator[dict[str, Any]]:
    """Per run and split: which tags the classifier missed or made up, and with which true ones."""
    for run, _, _ in members:
        for split, content in run.seen.items():
            names, drawn = content["class_names"], [s for s in content["samples"] if "found" in s]
            tags = content.get("tags", [sample["tags"] for sample in drawn])
            found_tags = content.get("found", [sample["found"] for sample in drawn])
            pairs = [(set(t), set(f)) for t, f in zip(tags, found_tags) if t is not None]
            rows = []
            for k in range(1, len(names)):
                true = [found for tags, found in pairs if k in tags]
                wrong = [tags for tags, found in pairs if k in found - tags]
                beside = [other for tags in wrong for other in tags]
                often = max(sorted(set(beside)), key=beside.count, default=None)
                seen_with = "" if often is None else f"{names[often]} ({beside.count(often)})"
                found_true = sum(k in found for found in true)
                row = names[k], len(true), found_true, len(true) - found_true, len(wrong), seen_with
                rows += [row] if true or wrong else []
            if rows:
                yield {"title": f"{run.name}, {split}", "rows": rows}


def config_differences(groups: Mapping[str, Sequence[Run]]) -> list[tuple[str, list[str]]]:
    """Keys in which the configs of groups differ, with the value of each."""
    configs = [dict(leaves(runs[0].config)) for runs in groups.values() if runs[0].config]
    keys = dict.fromkeys(key for config in configs for key in config)
    skipped = ("run_name", "work_dir", "seed")
    rows = [(key, [str(config.get(key, "-")) for config in configs]) for key in keys if key not in skipped]
    return [(key, values) for key, values in rows if len(set(values)) > 1]


def image_rows(members: Sequence[Member]) -> Iterator[dict[str, Any]]:
    """Per split: the runs that saw it, and its images with what each run saw."""
    splits = dict.fromkeys(split for run, _, _ in members for split in run.seen)
    for split in splits:
        shown = [member for member in members if split in member.run.seen]
        contents = [run.seen[split] for run, _, _ in shown]
        names = contents[0]["class_names"]
        images: dict[str, dict[str, Any]] = {}
        for i, content in enumerate(contents):
            for sample in content["samples"]:
                known = {"photo": sample["image"], "tags": sample["tags"], "cells": [None] * len(shown)}
                image = images.setdefault(sample["name"], known)
                maps = dict(sample["maps"])
                if "truth" in maps:
                    image["truth"] = maps.pop("truth")
                own = {"found": sample["found"]} if "found" in sample else {}
                if sample["image"] != image["photo"]:  # an object that a stage cut out
                    own["photo"] = sample["image"]
                image["cells"][i] = {"maps": maps, **own}
        for i, content in enumerate(contents):
            index_of = {name: k for k, name in enumerate(content.get("names", []))}
            for name, image in images.items():
                if (k := index_of.get(name)) is None:
                    continue
                cell = image["cells"][i] = image["cells"][i] or {"maps": {}}
                cell["iou"] = {output: values[k] for output, values in content["iou"].items()}
                before = content["before"]
                cell["before"] = {o: values[k] for o, values in before["iou"].items()} if before else {}
                image["index"] = k
        yield {
            "split": split,
            "classes": names,
            "colours": [f"rgb({r},{g},{b})" for r, g, b in PALETTE[: len(names)].tolist()],
            "runs": [
                {"name": run.name, "colour": colour, "step": run.seen[split].get("step"),
                 "threshold": run.seen[split].get("threshold"), "sweep": run.seen[split].get("sweep", {})}
                for run, _, colour in shown
            ],
            "images": [{"name": name, **image} for name, image in images.items()],
        }  # fmt: skip


# Places in a chart


def limits(chart: Chart) -> tuple[float, float, float, float]:
    """Smallest and largest x and y."""
    points = [point for _, _, line in chart.lines for point in line] or [(0.0, 0.0)]
    xs, ys = [x for x, _ in points], [y for _, y in points]
    low, high = min(*ys, 0.0) if min(ys) < 0.6 * max(ys) else min(ys), max(ys)
    room = 0.05 * (high - low) or abs(high) * 0.05 or 1.0
    start = 0.0 if chart.axis == "step" else min(xs)
    return start, max(*xs, start + 1e-9), low if low == 0 else low - room, high + room


def place(chart: Chart, x: float, y: float) -> Point:
    """Where a point is drawn."""
    x0, x1, y0, y1 = limits(chart)
    width, height = WIDTH - LEFT - MARGIN, HEIGHT - BOTTOM - MARGIN
    at = LEFT + width * (x - x0) / (x1 - x0), MARGIN + height * (1 - (y - y0) / (y1 - y0))
    return round(at[0], 1), round(at[1], 1)


def path_of(chart: Chart, points: Sequence[Point]) -> str:
    """Points of an SVG polyline."""
    return " ".join("{},{}".format(*place(chart, x, y)) for x, y in points)


def band_of(chart: Chart, colour: int) -> dict[str, str] | None:
    """Mean and 95 % interval of the lines of a colour; None for a single line."""
    lines = [dict(points) for own, _, points in chart.lines if own == colour]
    if len(lines) < 2:
        return None
    shared = sorted(set.intersection(*(set(line) for line in lines)))
    found = [(x, *interval([line[x] for line in lines])) for x in shared]
    *_, y0, y1 = limits(chart)
    low = [(x, max(mean - (half or 0), y0)) for x, mean, half in found]
    high = [(x, min(mean + (half or 0), y1)) for x, mean, half in found]
    mean = [(x, mean) for x, mean, _ in found]
    return {"mean": path_of(chart, mean), "area": path_of(chart, [*low, *reversed(high)])}


def ticks(chart: Chart, axis: int, count: int = 4) -> list[float]:
    """Round numbers within the limits of an axis: 0 for x, 1 for y."""
    low, high = limits(chart)[2 * axis : 2 * axis + 2]
    raw = (high - low) / count
    power = 10 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]
