"""Losses on pairwise similarities of features, of all tokens or of neighbouring pixels.

B images, (h, w) tokens or strided pixels; P directions and N sources of pixel pairs (ops/pairs.py).
"""

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from ops.pairs import PixelPairs
from utils.device import to_device
from utils.distributed import global_mean
from utils.image import IGNORE_INDEX
from utils.precision import full_precision


def patch_affinity_loss(patch_tokens: Tensor, affinity_label: Tensor) -> Tensor:
    """Pull tokens of the same pseudo class together, push the others apart (ToCo, patch token contrast).

    Args:
        patch_tokens: (B, D, h, w) features of the last block, any scale.
        affinity_label: (B, hw, hw) integers: 1 same class, 0 different class; every other value is ignored.

    Returns:
        Scalar in [0, 1]: 0 where positive pairs have |cos| = 1 and negative pairs |cos| = 0. The paper writes
        the plain cosine, its code the absolute value. Means run over the whole batch, on all processes.
    """
    with full_precision(patch_tokens):
        tokens = F.normalize(patch_tokens.float().flatten(2), dim=1, eps=1e-8)  # (B, D, hw)
        similarity = (tokens.transpose(1, 2) @ tokens).abs()  # (B, hw, hw)
        positive, negative = affinity_label == 1, affinity_label == 0
        # The +1 keeps both terms finite when a batch has no confident pair.
        pull = 1 - global_mean((similarity * positive).sum(), positive.sum(), offset=1)
        push = global_mean((similarity * negative).sum(), negative.sum(), offset=1)
        return 0.5 * (pull + push)


class PairLabel(NamedTuple):
    """What is known about pairs of pixels; pairs with an ignored end are none of the three."""

    bg_pos: Tensor  # (B, P, N) bool, both background
    fg_pos: Tensor  # (B, P, N) bool, both the same foreground class
    neg: Tensor  # (B, P, N) bool, different classes


def pair_label(label: Tensor, pairs: PixelPairs) -> PairLabel:
    """Labels of pixel pairs (PSA section 3.3, IRN equations 3 to 5).

    Args:
        label: (B, h, w) integers at the stride of the pairs: 0 background, 255 ignored, else a class.
    """
    source, destination = pairs.source(label)[..., None, :], pairs.destination(label)
    known = (source != IGNORE_INDEX) & (destination != IGNORE_INDEX)
    same = (source == destination) & known
    return PairLabel(bg_pos=same & (source == 0), fg_pos=same & (source != 0), neg=known & ~same)


def pair_affinity_loss(affinity: Tensor, label: PairLabel) -> dict[str, Tensor]:
    """Cross-entropy of pair affinities, a mean for each kind of pair (PSA equations 5 to 8, IRN equation 7).

    Args:
        affinity: (B, P, N) in [0, 1].
        label: of the same pairs. The means run over the pairs of the whole batch, on all processes.

    Returns:
        Scalars ``bg_pos``, ``fg_pos``, ``neg``; both papers weigh them 1/4, 1/4, 1/2.
    """
    with full_precision(affinity):
        affinity = affinity.float()
        # 1e-5 inside the logarithms and in the counts, as in the authors' programs.
        attract, repel = -(affinity + 1e-5).log(), -(1 + 1e-5 - affinity).log()
        return {
            "bg_pos": _masked_mean(attract, label.bg_pos),
            "fg_pos": _masked_mean(attract, label.fg_pos),
            "neg": _masked_mean(repel, label.neg),
        }


def pair_displacement_loss(displacement: Tensor, label: PairLabel, pairs: PixelPairs) -> dict[str, Tensor]:
    """Displacements of an object's pixels point to one place, those of background pixels are equal (IRN).

    For pixels i, j with displacements D the difference D_i - D_j should be j - i within an instance (IRN
    equation 9, here within a class) and 0 within the background (equation 10).

    Args:
        displacement: (B, 2, h, w) in pixels of the map; channel 0 down, channel 1 to the right.

    Returns:
        Scalars ``dp_fg``, ``dp_bg``: mean absolute errors in pixels.
    """
    with full_precision(displacement):
        displacement = displacement.float()
        source, destination = pairs.source(displacement), pairs.destination(displacement)
        difference = source[..., None, :] - destination  # (B, 2, P, N)
        offset = to_device(pairs.directions.T[:, :, None].float(), difference.device)  # (2, P, 1)
        return {
            "dp_fg": _masked_mean((difference - offset).abs(), label.fg_pos[:, None]),
            "dp_bg": _masked_mean(difference.abs(), label.bg_pos[:, None]),
        }


def _masked_mean(value: Tensor, mask: Tensor) -> Tensor:
    """Mean of (B, ...) values where the mask, of the same shape or broadcast to it, is set; 0 without any."""
    mask = mask.expand_as(value)
    return global_mean((value * mask).sum(), mask.sum(), offset=1e-5)
