"""Losses on pairwise similarities of features."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from utils.distributed import global_mean
from utils.precision import full_precision


def patch_affinity_loss(patch_tokens: Tensor, affinity_label: Tensor) -> Tensor:
    """Pull tokens of the same pseudo class together, push the others apart (ToCo, patch token contrast).

    Args:
        patch_tokens: (B, D, h, w) features of the last block, any scale.
        affinity_label: (B, hw, hw) integers: 1 same class, 0 different class; every other value is ignored.
            The means run over the pairs of the whole batch, on all processes.

    Returns:
        Scalar in [0, 1]; falls towards 0 as positive pairs reach |cos| = 1 and negative pairs |cos| = 0. The
        absolute value is in the authors' code, the paper writes the plain cosine.
    """
    with full_precision(patch_tokens):
        tokens = F.normalize(patch_tokens.float().flatten(2), dim=1, eps=1e-8)  # (B, D, hw)
        similarity = (tokens.transpose(1, 2) @ tokens).abs()  # (B, hw, hw)
        positive, negative = affinity_label == 1, affinity_label == 0
        # The +1 keeps both terms finite when a batch has no confident pair.
        pull = 1 - global_mean((similarity * positive).sum(), positive.sum(), offset=1)
        push = global_mean((similarity * negative).sum(), negative.sum(), offset=1)
        return 0.5 * (pull + push)
