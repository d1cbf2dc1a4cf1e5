"""Methods that know what they otherwise guess: how much a right guess would gain.

Those that train need ``data.learn_from=masks``; what is not named sees tags and CAMs alone.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from methods.affinitynet import AffinityNet
from methods.base import Batch
from methods.contrastive_vit import ContrastiveViT, Start
from methods.irnet import IRNet, walked_scores
from methods.seco import SeCo, category_tags
from methods.toco import ToCo
from models.refiners.random_walk import random_walk
from ops.cam import PresentClasses
from ops.labels import ignore_outside_box
from ops.pairs import PixelPairs
from utils.image import resize


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


class AffinityNetTrueWalk(AffinityNet):
    """PSA or SEAM whose walk stays within a class; ``propagate`` expects a mask (1, 1, H, W) as image."""

    def features(self, image: Tensor) -> Tensor:
        return 1000 * strided_classes(image, self.num_classes, self.stride)


class IRNetTrueWalk(IRNet):
    """IRN whose walk stays within a class; ``propagate`` expects a mask (1, 1, H, W) as image."""

    @torch.no_grad()
    def propagate(self, image: Tensor, cam: Tensor) -> Tensor:
        radius = self.walk["radius"]
        pairs, border = PixelPairs(radius), (radius, radius, 0, radius)
        label = strided_classes(image, self.num_classes, 4)[0].argmax(0)
        size = label.shape[-2], label.shape[-1]
        label = F.pad(label, border, value=-1)
        affinity = (pairs.destination(label) == pairs.source(label)).float()
        scores = F.pad(resize(cam[None], size)[0], border)
        walked = random_walk(scores, affinity, pairs, self.walk["beta"], 2 ** self.walk["exp_times"])
        walked = walked[:, : size[0], radius : radius + size[1]]
        return walked_scores(walked, (image.shape[-2], image.shape[-1]), self.background_threshold)


def strided_classes(mask: Tensor, num_classes: int, stride: int) -> Tensor:
    """(1, K, h, w) of a mask (1, 1, H, W): 1 for the most frequent class of each cell, 0 for the others.

    Cells at the right and bottom border may be cut; ignored pixels (255) count for no class.
    """
    shares = (mask[:, 0, None] == torch.arange(num_classes, device=mask.device)[:, None, None]).float()
    shares = F.avg_pool2d(shares, stride, ceil_mode=True, count_include_pad=False)
    return F.one_hot(shares.argmax(1), num_classes).movedim(-1, 1).float()
