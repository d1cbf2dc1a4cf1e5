"""Confusion ratio FP / TP (SeCo, CVPR 2024): how many wrong pixels come with each right one."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from datasets.lists import real_classes
from engine.scores.base import OUTPUTS, LabelScore, Values, finite, plain
from engine.scores.tables import number, text_table

TOP = 20  # confused pairs in ``scores.json``
SHOWN = 10  # of them in the table


class Confusion(LabelScore):
    """Confusion ratio, precision and recall per class, and the pairs of classes that are confused most.

    The ratio (equal to 1 / precision - 1, lower is better) is inf for a class that was predicted but never
    right. Ratio and precision are nan for a class that was never predicted, recall for one that never occurs.
    Means are over finite values.
    """

    title, key, is_share = "FP/TP", "mean_confusion", False

    def values(self, sums: Tensor) -> Values:
        matrix = sums.double()
        hits, truth, predicted = matrix.diagonal(), matrix.sum(1), matrix.sum(0)
        per_class = {
            "confusion": (predicted - hits) / hits,
            "precision": hits / predicted,
            "recall": hits / truth,
        }
        ratios = finite(per_class["confusion"])
        more = {
            "mean_precision": plain(finite(per_class["precision"]).mean()),
            "mean_recall": plain(finite(per_class["recall"]).mean()),
            "median_confusion": plain(ratios.median() if len(ratios) else math.nan),
            "confusion_classes": len(ratios),
            "confused_objects": self._named(top_confusions(sums)),
            "confused_with_background": self._named(top_confusions(sums, foreground=False)),
        }
        return Values(float(ratios.mean()), per_class, more)

    def table(self, found: Mapping[str, Values]) -> str:
        header, columns = ["Class"], []
        for output, values in found.items():
            for title, key in (("FP/TP", "confusion"), ("prec", "precision"), ("rec", "recall")):
                header.append(f"{OUTPUTS[output]} {title}")
                columns.append((values.per_class[key], key != "confusion"))
        names = real_classes(self.class_names)
        rows = [[name, *(number(c[k], share) for c, share in columns)] for k, name in names.items()]
        rows.append(["mean", *(number(finite(c).mean(), share) for c, share in columns)])
        rows.append(["finite", *(str(len(finite(c))) for c, _ in columns)])
        pairs = next(iter(found.values())).more["confused_objects"][:SHOWN]
        shown = [[pair["truth"], pair["predicted"], number(pair["share"])] for pair in pairs]
        pairs_table = text_table(["Truth", "Predicted as", "% of its pixels"], shown)
        return f"{text_table(header, rows)}\n{pairs_table}"

    def _named(self, pairs: Sequence[tuple[int, int, float]]) -> list[dict[str, str | float]]:
        names = self.class_names
        return [{"truth": names[k], "predicted": names[c], "share": round(share, 6)} for k, c, share in pairs]


def top_confusions(matrix: Tensor, count: int = TOP, foreground: bool = True) -> list[tuple[int, int, float]]:
    """The largest ``(truth class, predicted class, share of its pixels)`` off the diagonal.

    Args:
        matrix: (K, K) pixel counts, rows truth.
        foreground: both classes are objects (what their co-occurrence costs), else one of the two is
            background (objects that leak into their context, and objects that were missed).
    """
    share = (matrix.double() / matrix.sum(1, keepdim=True)).nan_to_num(0.0).fill_diagonal_(0.0)
    is_object = torch.arange(len(matrix)) > 0
    both = is_object[:, None] & is_object
    share = share.where(both if foreground else ~both, 0.0)
    values, order = share.flatten().topk(min(count, share.numel()))
    pairs = [divmod(int(i), len(matrix)) for i in order]
    return [(k, c, float(v)) for (k, c), v in zip(pairs, values, strict=True) if v > 0]
