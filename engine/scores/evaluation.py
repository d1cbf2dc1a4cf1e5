"""The scores that a config names, over the images of a split: from labels to tables and records."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from datasets.base import Record, Split
from datasets.lists import real_classes
from engine.details import Details
from engine.scores.base import ImagePrediction, Sample, Score, Values, create_score, plain
from engine.scores.records import short_name, write_scores
from engine.scores.tables import number
from utils.distributed import all_reduce_sum, is_main
from utils.image import IGNORE_INDEX, label_dtype

SCORES = ("miou", "confusion", "tag_f1", "cam_sweep")


class Evaluation:
    """The scores ``names`` of a split: of its labels, its CAMs at a background threshold, and its tags."""

    def __init__(
        self,
        split: Split,
        names: Iterable[str] = SCORES,
        threshold: float = 0.5,
        device: torch.device | str = "cpu",
    ) -> None:
        self.split, self.threshold, self.device = split, threshold, device
        self.scores = [create_score(name, split.class_names, device) for name in names]
        self.details: Details | None = None  # of a validation
        self.images = torch.zeros((), dtype=torch.int64, device=device)
        values = max(split.num_classes, IGNORE_INDEX + 1)
        self.truth = torch.zeros(values, dtype=torch.int64, device=device)  # pixels by mask value

    def add(self, record: Record, prediction: ImagePrediction, ignored: str = "error") -> None:
        """Score an image against its mask on disk; one without a mask is skipped.

        Args:
            ignored: what 255 in a label is: ``error``, ``background``, or ``skip`` (the pixel is left out).

        Raises:
            ValueError: a label has another size than the mask, or either holds values that are no classes.
        """
        if truth_path(record) is None:
            return
        mask = torch.from_numpy(record.read_mask()).to(self.device)
        for output, label in prediction.labels.items():
            if ignored != "error" and label.shape == mask.shape:
                if ignored == "skip":
                    mask = mask.masked_fill(label == IGNORE_INDEX, IGNORE_INDEX)
                prediction.labels[output] = label.masked_fill(label == IGNORE_INDEX, 0)
        sample = {"name": record.name, "mask": mask}
        if record.context is not None:
            sample["context"] = torch.from_numpy(record.read_context()).long().to(self.device)
        self.update(sample, prediction)

    def update(self, sample: Sample, prediction: ImagePrediction) -> None:
        """Add an image to all scores; ``sample`` holds its name, its mask and, where known, its tags."""
        dtype = label_dtype(self.split.num_classes)  # PyTorch compares bytes with 300 wrongly
        mask = sample["mask"].to(torch.promote_types(dtype, sample["mask"].dtype))
        sample = {**sample, "mask": mask}
        pixels = torch.bincount(mask.flatten(), minlength=len(self.truth))
        foreign = pixels.clone()
        foreign[: self.split.num_classes] = foreign[IGNORE_INDEX] = 0
        self._check("mask", sample, foreign.sum())
        for output, label in prediction.labels.items():
            if label.shape != mask.shape:
                sizes = f"{[*mask.shape]}, the prediction {[*label.shape]} (rows, columns)"
                raise ValueError(f"'{sample['name']}': the mask is {sizes}")
            label = prediction.labels[output] = label.to(torch.promote_types(dtype, label.dtype))
            wrong = (label >= self.split.num_classes) | (label == IGNORE_INDEX)
            if wrong.any():
                wrong &= (mask != IGNORE_INDEX) | (label > IGNORE_INDEX)
                self._check(f"{output} prediction", sample, wrong.sum())
        self.images += 1
        self.truth += pixels
        for score in self.counters:
            score.update(sample, prediction)

    def _check(self, what: str, sample: Sample, wrong: Tensor) -> None:
        if wrong:
            name, count = sample["name"], self.split.num_classes
            raise ValueError(f"{int(wrong)} pixels of the {what} of '{name}' are none of the {count} classes")

    @property
    def counters(self) -> list[Score | Details]:
        """All that sees every image."""
        return [*self.scores, *([self.details] if self.details else [])]

    def reduce(self) -> Evaluation:
        """Add the counts of all processes, once; a collective call. Returns itself."""
        for tensor in (self.images, self.truth, *(x for score in self.counters for x in score.tensors())):
            tensor.copy_(all_reduce_sum(tensor))
        return self

    @cached_property
    def results(self) -> dict[str, dict[str, Values]]:
        """Values by score and output."""
        return {score.name: score.compute() for score in self.scores}

    def percent(self) -> dict[str, float]:
        """The numbers of a training log, all shares: mIoU as ``seg``, others as ``seg_<name>``."""
        found = {}
        for score in self.scores:
            for output, values in self.results[score.name].items():
                if score.is_share:
                    parts = [output, score.name if score.name != "miou" else ""]
                    found["_".join(filter(None, parts))] = 100 * values.mean
        return found

    def tables(self, shares: bool = False) -> str:
        """Tables of all scores, or of shares alone."""
        scores = [score for score in self.scores if score.is_share or not shares]
        tables = [score.table(found) for score in scores if (found := self.results[score.name])]
        return "\n\n".join(filter(None, tables))

    def records(
        self, protocols: Mapping[str, str], settings: Mapping[str, Any], provenance: Mapping[str, Any]
    ) -> list[dict[str, Any]]:
        """Entries of ``scores.json``, one for each output.

        Args:
            protocols: id by output, of CAMs without a threshold.
        """
        outputs = dict.fromkeys(key for found in self.results.values() for key in found if key)
        records = []
        for key in outputs:
            output, _, best = key.partition("@")
            record: dict[str, Any] = {"protocol": protocols[output] + (f"@{best}" if best else "")}
            if output != "seg" and not best:
                record = {
                    "protocol": f"{protocols[output]}@{self.threshold:.2f}",
                    "threshold": self.threshold,
                }
            content: dict[str, Any] = {}
            names = real_classes(self.split.class_names)
            per_class: dict[str, dict[str, Any]] = {name: {} for name in names.values()}
            for score in self.scores:
                values = self.results[score.name].get(key)
                if values is None:
                    continue
                record |= values.about
                content |= {score.key: plain(values.mean), **values.more}
                for column, numbers in values.per_class.items():
                    for k, name in names.items():
                        per_class[name][column] = plain(numbers[k])
            record["score"] = {**content, "per_class": per_class}
            records.append({**record, "settings": dict(settings), "provenance": dict(provenance)})
        return records

    def report(
        self, folder: Path, protocol: str, settings: Mapping[str, Any], provenance: Mapping[str, Any]
    ) -> None:
        """Print tables and one line per record, and add the records to ``scores.json``; main process only.

        Says so where not all images have a mask, or where nothing can be scored.
        """
        if not is_main():
            return
        name, scored = short_name(self.split), [r for r in self.split.records if truth_path(r)]
        if not scored:
            print(f"no masks for {name}: nothing to score")
            return
        if self.lacks_classes and any(record.tags != () for record in scored):  # () shows no object at all
            print(f"no mask of {name} shows any class (class 1 must be 1): nothing to score")
            return
        if len(scored) < len(self.split):
            print(f"only {len(scored)} of {len(self.split)} images have a mask: the score covers these")
        print(self.tables())
        rest = protocol.partition("/")[2]
        protocols = {"seg": protocol, "cam": f"cam/{rest}", "aux_cam": f"aux_cam/{rest}"}
        records = self.records(protocols, settings, {**provenance, "scored_images": len(scored)})
        for record in records:
            means = {
                score.title: number(float(value), score.is_share)
                for score in self.scores
                if (value := record["score"].get(score.key)) is not None
            }
            line = "   ".join(f"{title} {mean:>6}" for title, mean in means.items())
            print(f"{record['protocol']:<40} {line}")
        write_scores(folder, records)
        print(f"scores   {folder / 'scores.json'}")

    @property
    def lacks_classes(self) -> bool:
        """Whether the truth holds ignored pixels, but none of an object, as masks of 0 and 255 do."""
        ignored = self.truth[IGNORE_INDEX]
        return bool(ignored) and bool(self.truth[1:].sum() == ignored)


def truth_path(record: Record) -> Path | None:
    """Where the ground truth of an image is; None where there is none."""
    return record.mask if record.mask is not None and record.mask.is_file() else None
