"""Scores on a split: the validation that runs during training, score tables, and where a score comes from.

Letters: B images, C foreground classes, K = C + 1 classes with background 0, S side of the square that images
are resized to.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
import torchvision
from torch import Tensor

from datasets.base import Batch, Sample, Split, WeakSegDataset
from datasets.loader import eval_loader
from engine.config.load import ROOT
from engine.scores.confusion import ConfusionMatrix, SegScores, tag_f1
from methods.base import Method, Predicts, finish_scores
from ops.cam import strongest_class, threshold_label
from utils.distributed import all_reduce_sum, is_main, shard, world_size
from utils.image import normalize, resize
from utils.logging import progress_bar
from utils.precision import autocast

COLUMNS = {"cam": "CAM", "aux_cam": "aux_CAM", "seg": "Seg_Pred"}


class Validation(dict[str, SegScores]):
    """Scores by output (``cam``, ``aux_cam``, ``seg``; what the method does not predict is left out) and what
    belongs to all.

    Attributes:
        tag_f1: mean over images of the binary F1 of predicted tags (logit > 0), in [0, 1].
        images: number of scored images.
        protocols: id of every score, by output.
        sweep: ``{"cam": {threshold: scores}, ...}``; empty unless thresholds were given.
    """

    tag_f1: float
    images: int
    protocols: dict[str, str]
    sweep: dict[str, dict[float, SegScores]]

    def percent(self) -> dict[str, float]:
        """mIoU of every output, and ``tag_f1``, in percent: the numbers of a training log."""
        return {name: 100 * scores.miou for name, scores in self.items()} | {"tag_f1": 100 * self.tag_f1}


def validate(
    method: Method,
    dataset: WeakSegDataset,
    *,
    size: int,
    device: torch.device | str,
    num_workers: int = 0,
    precision: str = "fp32",
    batch_size: int | None = None,
    thresholds: Sequence[float] = (),
    progress: bool = True,
) -> Validation:
    """Score CAM, auxiliary CAM, segmentation and tags as the trainers of the single-stage methods do.

    Every image is resized to a square whatever its aspect ratio, predicted once, and the maps are resized
    (bilinear, no corner alignment) to the size of its mask. A CAM becomes a label by taking the strongest
    class among the true tags where it exceeds ``method.background_threshold``. Runs sharded when a process
    group is there; then every process returns the scores of the whole split. The method is put in eval mode
    and back. Images whose tags are unknown count for the segmentation only.

    Args:
        dataset: without a transform and with masks.
        size: S, pixels.
        precision: fp32, bf16 or auto (bf16 on a GPU that has it).
        batch_size: images per forward pass; changes the speed, not the scores. None: 1 on a CPU, 8 on a GPU.
        thresholds: further background thresholds to score the CAMs at, in the same pass.

    Raises:
        ValueError: the data set does not load masks, or a mask holds values that are not classes.
    """
    device = torch.device(device)
    if not isinstance(method, Predicts):
        raise ValueError(f"{type(method).__name__} predicts nothing to score: set data.val_set=null")
    if not dataset.with_mask:
        raise ValueError("validation scores against ground truth: make the data set with with_mask=True")
    names = ("cam", "aux_cam", "seg")
    k = dataset.split.num_classes
    matrices = {name: ConfusionMatrix(k, device) for name in names}
    sweep = {name: {t: ConfusionMatrix(k, device) for t in thresholds} for name in names[:2]}
    # Sums over images: all, tagged, tag F1, and how often each output was there. Every process keeps the same
    # entries, whatever it saw, or the sum over processes would wait for ever.
    totals = dict.fromkeys(("images", "tagged", "tag_f1", *names), 0.0)

    batch_size = batch_size or (8 if device.type == "cuda" else 1)
    loader = eval_loader(dataset, num_workers, shard(len(dataset)))
    bar = progress_bar(
        loader,
        desc="validate",
        unit="img",
        leave=False,
        disable=not (progress and is_main()),
    )
    was_training = method.training
    method.eval()
    try:
        for chunk in _chunks(map(single, bar), batch_size):
            image = torch.cat([resize(normalize(s["image"].to(device))[None], (size, size)) for s in chunk])
            with torch.no_grad(), autocast(device, precision):
                out = method.predict(image, method.cam_scales)
            for i, sample in enumerate(chunk):
                mask = sample["mask"].to(device)
                totals["images"] += 1
                if out.seg_logits is not None:
                    totals["seg"] += 1
                    scores = resize(out.seg_logits[i : i + 1].float(), mask.shape)
                    scores = finish_scores(method, scores, out.class_logits[None, i : i + 1].float())
                    matrices["seg"].update(mask, scores.argmax(1)[0])
                if "class_label" not in sample:
                    continue
                class_label = sample["class_label"].to(device)
                totals["tagged"] += 1
                totals["tag_f1"] += float(tag_f1(out.class_logits[i], class_label))
                class_ids = class_label.nonzero()[:, 0] + 1
                for name, cam in (("cam", out.cam), ("aux_cam", out.aux_cam)):
                    if cam is None:
                        continue
                    totals[name] += 1
                    present = cam[i, class_ids - 1].float()
                    score, label = strongest_class(present, class_ids, mask.shape)
                    matrices[name].update(mask, threshold_label(score, label, method.background_threshold))
                    for threshold, matrix in sweep[name].items():
                        matrix.update(mask, threshold_label(score, label, threshold))
    finally:
        method.train(was_training)

    # float32 where the device has no float64; counts of images stay exact in it.
    exact = torch.float32 if device.type == "mps" else torch.float64
    sums = all_reduce_sum(torch.tensor(list(totals.values()), dtype=exact, device=device)).tolist()
    totals = dict(zip(totals, sums, strict=True))
    result = Validation()
    result.images = int(totals["images"])
    result.tag_f1 = totals["tag_f1"] / totals["tagged"] if totals["tagged"] else float("nan")
    result.protocols, result.sweep = {}, {}
    cam_views: dict[str, Any] = {"scales": method.cam_scales, "threshold": method.background_threshold}
    for name in names:
        reduced = matrices[name].reduce()
        tried = {t: m.reduce() for t, m in sweep.get(name, {}).items()}
        if totals[name]:
            result[name] = reduced.scores()
            views = {} if name == "seg" else cam_views
            result.protocols[name] = protocol_id(name, dataset.split.name, **views)
            if tried:
                result.sweep[name] = {t: m.scores() for t, m in tried.items()}
    return result


def single(batch: Batch) -> Sample:
    """The only sample of a batch of one, as evaluation loaders give them."""
    return {
        key: value[0] if isinstance(value, list) or (isinstance(value, Tensor) and value.ndim) else value
        for key, value in batch.items()
    }


def score_table(scores: Mapping[str, SegScores], class_names: Sequence[str]) -> str:
    """IoU in percent per class and output, the table that the published logs print.

    The last row is the mean over classes that occur in the truth (the reference prints nan there when one is
    absent).
    """
    rows = [[name, *(_percent(s.iou[i]) for s in scores.values())] for i, name in enumerate(class_names)]
    rows.append(["mIoU", *(_percent(s.miou) for s in scores.values())])
    return text_table(["Class", *(COLUMNS.get(name, name) for name in scores)], rows)


def confusion_table(scores: Mapping[str, SegScores], class_names: Sequence[str]) -> str:
    """Confusion ratio FP / TP, precision and recall (percent) per class and output.

    The mean of the ratio is over classes with at least one true positive; how many those are is in the row
    below.
    """
    header, columns, means, counts = ["Class"], [], ["mean"], ["finite"]
    for name, s in scores.items():
        header += [f"{COLUMNS.get(name, name)} {what}" for what in ("FP/TP", "prec", "rec")]
        columns += [
            [_ratio(v) for v in s.confusion],
            [_percent(v) for v in s.precision],
            [_percent(v) for v in s.recall],
        ]
        for values, show in ((s.confusion, _ratio), (s.precision, _percent), (s.recall, _percent)):
            finite = values[values.isfinite()]
            means.append(show(finite.mean()))
            counts.append(str(len(finite)))
    rows = [[name, *(column[i] for column in columns)] for i, name in enumerate(class_names)]
    return text_table(header, [*rows, means, counts])


def pair_table(scores: SegScores, class_names: Sequence[str], count: int = 10) -> str:
    """The most confused object pairs: share (percent) of the truth class's pixels predicted as the other."""
    pairs = scores.top_confusions(count)
    return text_table(
        ["Truth", "Predicted as", "% of its pixels"],
        [[class_names[k], class_names[c], _percent(v)] for k, c, v in pairs],
    )


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """An aligned table; the last rule stands before the row ``mIoU`` or ``mean``."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    rule = "-+-".join("-" * width for width in widths)

    def line(row: Sequence[str]) -> str:
        first, *others = zip(row, widths, strict=True)
        return " | ".join([first[0].ljust(first[1]), *(text.rjust(width) for text, width in others)])

    lines = [line(header), rule]
    for row in rows:
        lines += [rule] if row[0] in ("mIoU", "mean") else []
        lines.append(line(row))
    return "\n".join(lines)


def protocol_id(
    kind: str,
    split: str,
    scales: Sequence[float] = (1.0,),
    flip: bool = False,
    crf: str | None = None,
    tags: bool = False,
    crops: Mapping[str, Sequence[int]] | None = None,
    threshold: float | None = None,
) -> str:
    """The id that a score is quoted with, for example ``seg/val/ms+flip`` (docs/evaluation.md).

    Args:
        kind: ``seg``, ``cam`` or ``aux_cam``. A CAM is always made with scale 1 and mirror images, whatever
            ``scales`` and ``flip`` say.
        crf: ``DenseCRF.protocol``.
        threshold: background threshold at which a CAM is scored.
    """
    if kind != "seg":
        scales, flip = sorted({1.0, *scales}), True
    if crops:
        views = f"crops({','.join('x'.join(map(str, crops[key])) for key in ('window', 'grid'))})"
    else:
        views = "ms" if len(scales) > 1 else "ss" if scales[0] == 1 else f"ss({scales[0]:g})"
    steps = [views, *(["flip"] if flip else []), *(["tags"] if tags else []), *([crf] if crf else [])]
    return f"{kind}/{split}/{'+'.join(steps)}" + ("" if threshold is None else f"@{threshold:.2f}")


def score_record(
    protocol: str,
    scores: SegScores,
    class_names: Sequence[str],
    settings: Mapping[str, Any],
    provenance: Mapping[str, Any],
    **more: Any,
) -> dict[str, Any]:
    """One entry of ``scores.json``."""
    return {
        "protocol": protocol,
        **more,
        "score": scores.to_dict(class_names),
        "settings": dict(settings),
        "provenance": dict(provenance),
    }


def provenance(cfg: Mapping[str, Any] | None, split: Split) -> dict[str, Any]:
    """What a score rests on, as plain values: code version, seed, data, libraries and command."""
    cfg = cfg or {}
    return {
        "git_commit": git_commit(),
        "run_name": cfg.get("run_name"),
        "seed": cfg.get("seed"),
        "split": split.name,
        "images": len(split.records),
        "data_fingerprint": split.fingerprint(),
        "processes": world_size(),
        "versions": {
            "python": sys.version.split()[0],
            "torch": str(torch.__version__),
            "torchvision": str(torchvision.__version__),
            "numpy": np.__version__,
        },
        "command": " ".join(sys.argv),
    }


@cache
def git_commit() -> str | None:
    """Commit of the project, ``+dirty`` if tracked files were changed; None outside a repository."""

    def git(*words: str) -> str:
        command = ["git", "-C", str(ROOT), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + (
            "+dirty" if git("status", "--porcelain", "--untracked-files=no") else ""
        )
    except (OSError, subprocess.CalledProcessError):
        return None


def _chunks(samples: Iterable[Sample], count: int) -> Iterator[list[Sample]]:
    chunk: list[Sample] = []
    for sample in samples:
        chunk.append(sample)
        if len(chunk) == count:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def _percent(value: Tensor | float) -> str:
    number = 100 * float(value)
    return "-" if number != number else f"{number:.2f}"


def _ratio(value: Tensor | float) -> str:
    number = float(value)
    return "-" if number != number else f"{number:.3f}"
