"""Methods that know what they otherwise guess: how much a right guess would gain.

All need ``data.learn_from=masks``; what is not named sees tags and CAMs alone.
"""

import torch
from torch import Tensor

from methods.base import Batch
from methods.contrastive_vit import ContrastiveViT, Start
from methods.seco import SeCo, category_tags
from methods.toco import ToCo
from ops.cam import PresentClasses
from ops.labels import ignore_outside_box


class SeCoTrueTags(SeCo):
    """SeCo whose crops are tagged by masks."""

    labels = "masks"

    @torch.no_grad()
    def decompose(self, batch: Batch, cam: Tensor, present: PresentClasses) -> tuple[Tensor, Tensor]:
        positions, _ = super().decompose(batch, cam, present)
        label = ignore_outside_box(batch["pseudo_label"], batch["valid_box"])
        return positions, category_tags(
            label, positions, self.local_crop_size, self.tag_threshold, self.follow
        )


class TrueLabels(ContrastiveViT):
    """A method whose decoder learns from masks."""

    labels = "masks"

    def begin(self, batch: Batch, step: int) -> Start:
        label = ignore_outside_box(batch["pseudo_label"], batch["valid_box"])
        return super().begin(batch, step)._replace(pseudo_label=label)


class ToCoTrueLabels(TrueLabels, ToCo):
    """ToCo with the masks as labels of its decoder."""


class SeCoTrueLabels(TrueLabels, SeCo):
    """SeCo with the masks as labels of its decoder."""
