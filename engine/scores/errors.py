"""Causes of wrong pixels, and the mIoU that mending each of them would give."""

from collections.abc import Mapping
from itertools import pairwise

import torch
from torch import Tensor

from engine.scores.base import OUTPUTS, ImagePrediction, LabelScore, Values, plain
from engine.scores.boundary_f import grown, outline, tolerance
from engine.scores.miou import Miou
from engine.scores.tables import number, text_table
from utils.image import IGNORE_INDEX

# A wrong pixel has the first cause that fits.
CAUSES = {
    "made-up class": "the predicted class is nowhere in the image",
    "missed class": "the true class is predicted nowhere in the image",
    "boundary": "near an outline of the truth, as boundary_f counts it",
    "wrong class": "one class of the image is taken for another",
    "surplus": "background is taken for a class of the image",
    "missing part": "a class is taken for background",
}
BINS = (0.0, 0.01, 0.05, 0.2, 1.0)  # sizes of the region of a class, as shares of the image


class Errors(LabelScore):
    """Share of the pixels that are wrong; by cause, what truth in their place would add to the mIoU.

    The first two causes are wrong tags, the last three wrong places. Gains of several causes do not add up.
    The score also has the recall of objects, as any class and with the right name, and that of regions by
    size: a region is all of a class in an image.
    """

    title = "wrong pixels"

    @property
    def shape(self) -> tuple[int, ...]:
        return 1 + len(CAUSES) + len(BINS) - 1, self.num_classes, self.num_classes

    def count(self, mask: Tensor, prediction: ImagePrediction, output: str) -> Tensor:
        whole, k = prediction.matrix(output, mask, self.num_classes), self.num_classes
        mask, label = mask.long(), prediction.labels[output].long()
        cells = (causes(mask, label) * k + mask) * k + label
        counts = torch.bincount(cells[mask != IGNORE_INDEX], minlength=(1 + len(CAUSES)) * k * k)
        by_cause = counts.view(-1, k, k)[1:]
        share = whole.sum(1) / mask.numel()
        sizes = torch.bucketize(share, torch.tensor(BINS[1:-1], device=mask.device))
        by_size = torch.stack([whole * (sizes == i)[:, None] for i in range(len(BINS) - 1)])
        return torch.cat([whole[None], by_cause, by_size])

    def values(self, sums: Tensor) -> Values:
        whole, by_cause, by_size = sums[0], sums[1 : 1 + len(CAUSES)], sums[1 + len(CAUSES) :]
        miou = Miou(self.class_names)
        before, pixels = miou.values(whole).mean, whole.sum()
        found = {}
        for name, wrong in zip(CAUSES, by_cause, strict=True):
            mended = whole - wrong + wrong.sum(1).diag()
            gain = miou.values(mended).mean - before
            found[name] = {"share": plain(wrong.sum() / pixels), "gain": plain(gain)}
        objects = by_size[:, 1:]
        recall = objects[..., 1:].diagonal(dim1=1, dim2=2).sum(1) / objects.sum((1, 2))
        shown, named = whole[1:, 1:].sum(), whole[1:, 1:].diagonal().sum()
        more = {
            "causes": found,
            "geometric_recall": plain(shown / whole[1:].sum()),
            "named_share": plain(named / shown),
            "recall_by_size": [plain(value) for value in recall],
        }
        return Values(float(1 - whole.diagonal().sum() / pixels), {}, more)

    def table(self, found: Mapping[str, Values]) -> str:
        columns = [f"{OUTPUTS[output]} {what}" for output in found for what in ("%", "mIoU")]
        rows = []
        for name in CAUSES:
            cells = [values.more["causes"][name] for values in found.values()]
            rows.append([name, *(_shown(cell[key]) for cell in cells for key in ("share", "gain"))])
        sizes = [
            [title, *(_shown(values.more[key]) for values in found.values())]
            for title, key in (
                ("as any class", "geometric_recall"),
                ("of this, with its name", "named_share"),
            )
        ]
        for i, (low, high) in enumerate(pairwise(BINS)):
            recall = [values.more["recall_by_size"][i] for values in found.values()]
            sizes.append([f"{100 * low:g} - {100 * high:g} % of the image", *map(_shown, recall)])
        by_size = text_table(["recall of object pixels", *(OUTPUTS[output] for output in found)], sizes)
        return f"{text_table(['wrong pixels', *columns], rows)}\n\n{by_size}"


def _shown(value: float | None) -> str:
    return "-" if value is None else number(value)


def causes(mask: Tensor, label: Tensor) -> Tensor:
    """(H, W) number of the cause of each wrong pixel, from 1; 0 where it is right, or its truth unknown."""
    known = mask != IGNORE_INDEX
    wrong, background = known & (mask != label), 0
    shown, painted = mask.unique(), label[known].unique()
    edge = torch.zeros_like(known)
    for k in shown.tolist():
        if k != IGNORE_INDEX:
            edge |= outline(mask == k)
    fits = [
        ~torch.isin(label, shown) & (label != background),
        ~torch.isin(mask, painted) & (mask != background),
        grown(edge, tolerance(mask) - 1),
        (mask != background) & (label != background),
        mask == background,
        label == background,
    ]
    first = torch.stack(fits).int().argmax(0) + 1
    return first * wrong
