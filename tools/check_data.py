"""Everything that is wrong with a data set, in one list, before a training.

    python tools/check_data.py data.root=data/custom
    python tools/check_data.py config=configs/toco/voc.yaml --json

Without config=FILE the set is one of your own (configs/datasets/custom.yaml). Errors stop a training or spoil
its scores: with one the tool ends with code 1. It also measures ``data.value_range``, mean and deviation.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from engine.config.common import DataOptions
from engine.config.options import command_line, option

if TYPE_CHECKING:
    from datasets.base import Record, Split
    from datasets.examine import Facts

SHOWN = 5  # entries of a finding on the terminal; --json has all of them


@dataclass(kw_only=True)
class Options(DataOptions):
    splits: list[str] = option([], "splits to check; default: data.train_set and data.val_set")
    json: bool = option(False, "print findings and measures as JSON")
    num_workers: int | None = option(None, "threads that read files; default: one for each core", free=True)


@dataclass
class Finding:
    """One kind of fault."""

    level: str  # error or warning
    split: str
    text: str
    entries: list[str] = field(default_factory=list)


def run(options: Options) -> dict[str, Any]:
    """Check a data set; returns ``findings`` and, for each split, ``measures``."""
    from datasets.examine import measure
    from engine.data import data_config
    from utils.logging import collected_warnings

    # data=FOLDER is short for data.root=FOLDER.
    given = [f"data.root={item[5:]}" if item.startswith("data=") else item for item in options.overrides]
    if not options.model_path and not any(item.startswith("config=") for item in given):
        given.insert(0, "config=datasets/custom.yaml")
    data = data_config(replace(options, overrides=given)).data
    names = options.splits or list(dict.fromkeys(name for name in (data.train_set, data.val_set) if name))
    findings: list[Finding] = []
    measures: dict[str, Any] = {}
    facts: dict[str, dict[str, Facts]] = {}
    with collected_warnings() as warnings:
        for name in names:
            split, problems = load(data, name)
            findings += grouped(name, problems)
            if split is not None:
                facts[name] = read_files(split, options)
                findings += file_findings(name, split, facts[name])
                findings += tag_findings(name, split, name == data.train_set and not problems)
                findings += mask_findings(name, split, facts[name])
                measures[name] = measure(split, facts[name].values())
        findings += [Finding("warning", "", text) for text in warnings]
    findings += overlaps(facts)
    findings.sort(key=lambda finding: finding.level)
    report = {"findings": [asdict(finding) for finding in findings], "measures": measures}
    print(json.dumps(report, indent=1) if options.json else as_text(findings, measures))
    return report


def load(data: Any, name: str) -> tuple[Split | None, list[str]]:
    """What can be read of a split, and everything that cannot."""
    from engine.config.load import to_plain
    from engine.data import load_split
    from utils.problems import all_problems

    split = None
    with all_problems() as problems:
        split = load_split(data, name)
    if split is None:  # its pictures can be looked at without tags
        plain = to_plain(data)
        names = plain["options"].get("class_names") or ["object"]
        plain["options"] |= {"tags": None, "masks": None, "class_names": names}
        with all_problems():
            split = load_split(plain, name)
    return split, list(dict.fromkeys(problems))


def grouped(name: str, problems: list[str]) -> list[Finding]:
    """An error for each problem; the same one at several places, such as a misspelt class, is one error."""
    alike: dict[str, list[str]] = {}
    for text in problems:
        alike.setdefault(text.partition(": ")[2] or text, []).append(text)
    found = []
    for what, texts in alike.items():
        places = [text.partition(": ")[0] for text in texts]
        several = Finding("error", name, f"{len(texts)} times: {what}", places)
        found.append(several if len(texts) > 1 else Finding("error", name, texts[0]))
    return found


def read_files(split: Split, options: Options) -> dict[str, Facts]:
    """The facts of every image, by name."""
    from datasets.examine import examine
    from utils.logging import progress_bar
    from utils.pool import WorkerPool, core_count

    facts: dict[str, Facts] = {}
    workers = core_count() if options.num_workers is None else options.num_workers
    with WorkerPool(workers, threads=True) as pool:
        for record in progress_bar(split.records, desc=f"read {split.name}", unit="img", leave=False):
            keep = partial(facts.__setitem__, record.name)
            pool.submit(examine, record, split, then=keep)
    return facts


def file_findings(name: str, split: Split, facts: Mapping[str, Facts]) -> list[Finding]:
    """Files that are damaged or do not fit together."""
    found = []
    records = {record.name: record for record in split.records}
    faults = {
        "images cannot be read": [f.image_error for f in facts.values() if f.image_error],
        "masks cannot be used": [f.mask_error for f in facts.values() if f.mask_error],
        "masks are missing": [str(r.mask) for r in split.records if r.mask and not r.mask.is_file()],
    }
    for what, entries in faults.items():
        if entries:
            found.append(Finding("error", name, f"{len(entries)} of {len(split)} {what}", entries))
    same: dict[str, list[str]] = {}
    for image, fact in facts.items():
        if fact.digest and records[image].window is None:
            same.setdefault(fact.digest, []).append(image)
    copies = [" = ".join(images) for images in same.values() if len(images) > 1]
    if copies:
        found.append(Finding("warning", name, f"images that are there more than once: {len(copies)}", copies))
    kinds = {fact.kind for fact in facts.values() if fact.bands is not None}
    if kinds and len({fact.kind for fact in facts.values() if fact.kind}) > 1:
        found.append(Finding("warning", name, f"pictures of several depths, first {min(kinds)}"))
    return found


def tag_findings(name: str, split: Split, is_trained: bool) -> list[Finding]:
    """Tags that cannot be learned from."""
    from datasets.agreement import class_counts, tag_warnings

    found = []
    if is_trained and (untagged := [r.name for r in split.records if r.tags is None]):
        found.append(Finding("error", name, f"{len(untagged)} of {len(split)} images have no tags", untagged))
    if split.has_tags and (never := [word for word, count in class_counts(split).items() if not count]):
        found.append(Finding("warning", name, f"classes without an image: {len(never)}", never))
    return found + [Finding("warning", name, text) for text in tag_warnings(split)]


def mask_findings(name: str, split: Split, facts: Mapping[str, Facts]) -> list[Finding]:
    """Masks that contradict tags: most of them an error, single ones warnings."""
    from datasets.agreement import Agreement
    from utils.image import IGNORE_INDEX

    agreement = Agreement(split)
    untagged, lacking, empty = [], [], []
    for record in split.records:
        mask = facts[record.name].shown
        if mask is None or record.tags is None:
            continue
        agreement.add(record, mask)
        shown, tags = set(mask.tolist()) - {0, IGNORE_INDEX}, set(record.tags)
        if shown - tags:
            untagged.append(with_classes(record, split, shown - tags))
        if tags and not shown:
            empty.append(with_classes(record, split, tags))
        elif tags - shown:
            lacking.append(with_classes(record, split, tags - shown))
    if error := agreement.error():
        return [Finding("error", name, error)]
    if empty and not agreement.shown.any():
        return [Finding("error", name, "no mask shows any class: objects of class 1 have the value 1")]
    found = [Finding("warning", name, warning)] if (warning := agreement.warning()) else []
    odd = {"masks that show a class without its tag": untagged}
    if all(record.window is None for record in split.records):  # a tile has the tags of its whole image
        odd |= {"masks that lack a tagged class": lacking, "masks of tagged images that show no class": empty}
    return found + [
        Finding("warning", name, f"{what}: {len(images)}", images) for what, images in odd.items() if images
    ]


def with_classes(record: Record, split: Split, ids: set[int]) -> str:
    """An image and some classes, for a list."""
    return f"{record.name}: {', '.join(split.class_names[k] for k in sorted(ids))}"


def overlaps(facts: Mapping[str, Mapping[str, Facts]]) -> list[Finding]:
    """Images of one split that are in another one too, under their own name or another one."""
    found = []
    for first, second in itertools.combinations(facts, 2):
        both = sorted(facts[first].keys() & facts[second].keys())
        there = {fact.digest: image for image, fact in facts[first].items() if fact.digest}
        copies = [
            f"{image} = {there[fact.digest]}"
            for image, fact in facts[second].items()
            if fact.digest in there and image not in both
        ]
        if both:
            found.append(Finding("error", second, f"images that are in '{first}' too: {len(both)}", both))
        if copies:
            found.append(Finding("warning", second, f"copies of images of '{first}': {len(copies)}", copies))
    return found


def as_text(findings: list[Finding], measures: Mapping[str, Any]) -> str:
    """The report for a terminal."""
    lines = []
    for name, m in measures.items():
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(m["kinds"].items()))
        sizes = f"{m['width'][0]}-{m['width'][1]} x {m['height'][0]}-{m['height'][1]} pixels"
        lines.append(f"{name:<8} {m['images']} images ({kinds}; {sizes}), {m['masks']} masks")
        counts = ", ".join(f"{word} {count}" for word, count in m["classes"].items())
        known = f"{counts}; without objects {m['without_objects']}"
        lines.append(f"         {known if counts else 'classes unknown'}")
        lines.append(f"         channels: mean {m['mean']}, std {m['std']} of 0..255")
        if m["value_range"]:
            lines.append(f"         99 % of the values of deep files: data.value_range={m['value_range']}")
    for finding in findings:
        lines.append(f"{finding.level:<8} {finding.split + ': ' if finding.split else ''}{finding.text}")
        lines += [f"         {entry}" for entry in finding.entries[:SHOWN]]
        if more := finding.entries[SHOWN:]:
            lines.append(f"         ... and {len(more)} more")
    errors = sum(finding.level == "error" for finding in findings)
    lines.append(f"errors: {errors}, warnings: {len(findings) - errors}")
    return "\n".join(lines)


def main(options: Options) -> None:
    """Check, and end with code 1 if there are errors."""
    report = run(options)
    sys.exit(any(finding["level"] == "error" for finding in report["findings"]))


if __name__ == "__main__":
    command_line(Options, main, __doc__)
