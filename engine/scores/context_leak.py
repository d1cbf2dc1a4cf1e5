"""Context leak: how much more of its home context is painted with a class than of other contexts."""

from collections.abc import Sequence

import torch
from torch import Tensor

from datasets.demo.contexts import CONTEXTS
from datasets.demo.objects import OBJECTS
from engine.scores.base import OUTPUTS, ImagePrediction, LabelScore, Sample, Values


class ContextLeak(LabelScore):
    """Share of a class's home context that is painted with the class, less that share of other contexts.

    Counted in images that show the class, on ground without any object. Where contexts are drawn without
    looking at the objects (split ``test_shuffled`` of the generated scenes), it is 0 for a network that does
    not use contexts, whatever else it gets wrong. The mean is over all classes.
    """

    title = "context leak"

    @property
    def shape(self) -> tuple[int, ...]:
        return self.num_classes - 1, len(CONTEXTS), 2

    def update(self, sample: Sample, prediction: ImagePrediction) -> None:
        if "context" not in sample:
            raise ValueError(f"image '{sample['name']}' has no map of contexts: set data.options.contexts")
        for i, output in enumerate(OUTPUTS):
            if output in prediction.labels:
                label = prediction.labels[output]
                self.images[i] += 1
                self.sums[i] += ground_counts(sample["context"], sample["mask"], label, self.num_classes)

    def values(self, sums: Tensor) -> Values:
        leak = leak_of_counts(sums, self.class_names)
        background = leak.new_full((1,), torch.nan)  # it has no home
        return Values(float(leak.nanmean()), {"context_leak": torch.cat([background, leak])})


def ground_counts(context: Tensor, mask: Tensor, label: Tensor, num_classes: int) -> Tensor:
    """(C, contexts, 2) pixels of an image: painted with a class that it shows, and all; by context.

    Args:
        context, mask, label: (H, W); contexts above the last one, and pixels of objects, do not count.
    """
    ground = (mask == 0) & (context < len(CONTEXTS))
    cells = context[ground] * num_classes + label[ground]
    table = torch.bincount(cells, minlength=len(CONTEXTS) * num_classes).view(-1, num_classes)
    shown = torch.isin(torch.arange(1, num_classes, device=mask.device), mask)
    painted = table[:, 1:].T
    return torch.stack([painted, table.sum(1).expand_as(painted)], 2) * shown[:, None, None]


def leak_of_counts(counts: Tensor, class_names: Sequence[str]) -> Tensor:
    """(..., C) leak of each class; nan where it is not on its home, or on no other context.

    Args:
        counts: (..., C, contexts, 2), sums of `ground_counts`.

    Raises:
        ValueError: a class is none of the generated scenes.
    """
    if unknown := [name for name in class_names[1:] if name not in OBJECTS]:
        raise ValueError(f"context_leak expects the classes of the generated scenes, not '{unknown[0]}'")
    counts = counts.double()
    home = torch.tensor([CONTEXTS.index(OBJECTS[name].home) for name in class_names[1:]])
    at_home = counts[..., torch.arange(len(home)), home, :]
    elsewhere = counts.sum(-2) - at_home
    return at_home[..., 0] / at_home[..., 1] - elsewhere[..., 0] / elsewhere[..., 1]
