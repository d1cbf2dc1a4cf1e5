"""Methods that know what they otherwise guess: how much a right guess would gain."""

import torch
from torch import Tensor

from methods.base import Batch
from methods.seco import SeCo, category_tags
from ops.cam import PresentClasses
from ops.labels import ignore_outside_box


class SeCoTrueTags(SeCo):
    """SeCo whose crops are tagged by masks (``data.learn_from=masks``); all else sees tags and CAMs alone."""

    labels = "masks"

    @torch.no_grad()
    def decompose(self, batch: Batch, cam: Tensor, present: PresentClasses) -> tuple[Tensor, Tensor]:
        positions, _ = super().decompose(batch, cam, present)
        label = ignore_outside_box(batch["pseudo_label"], batch["valid_box"])
        return positions, category_tags(
            label, positions, self.local_crop_size, self.tag_threshold, self.follow
        )
