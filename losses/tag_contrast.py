"""Contrastive losses between class tokens that carry category tags (SeCo, Yang et al., CVPR 2024).

Tags are integers: 1..C a class, 0 background, -1 mixed or unknown, which takes no part. R query tokens of
this process, M keys, C classes, D projection size. Every normaliser counts over the global batch.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from utils.device import positions
from utils.distributed import all_reduce_sum, global_mean
from utils.precision import full_precision

MIXED = -1


def local_to_local_contrast(
    query: Tensor,
    keys: Tensor,
    query_tags: Tensor,
    key_tags: Tensor,
    temperature: float,
    twice: Tensor | None = None,
    revise_ratio: float = 10.0,
    eps: float = 1e-12,
) -> tuple[Tensor, Tensor]:
    """Pull tokens of the same tag together and push all others apart (SeCo, LIL); revise unlikely tags.

    With logits l_ij = q_i . k_j / T less their row maximum, l+ = l where the tags agree and 0 elsewhere, S_i
    the sum of exp(l_ij) over keys that are not mixed, and Z the number of non-zero entries of l+:

        loss = -(1/R) sum_i ( sum_j l+_ij - M log S_i ) / Z

    As in the authors' code, beyond the paper: log S_i enters once per key, not once per positive; S_i leaves
    the row's maximum out, every copy of it; background tokens are positives of one another; rows whose
    bracket is not negative are dropped.

    Args:
        query: (R, D) unit rows, with gradient.
        keys: (M, D) unit rows without gradient, the same on every process.
        query_tags: (R,) int64.
        key_tags: (M,) int64.
        temperature: T.
        twice: (N,) keys that count twice, all different.
        revise_ratio: a query becomes background where the entries of l+ below their mean outnumber the others
            by more than this factor. l+ is 0 for the many keys of another tag: the authors' program never
            revises.

    Returns:
        Scalar, at least 0, and the revised tags (R,), a new tensor.
    """
    with full_precision(query):
        logits = query.float() @ keys.float().T / temperature  # (R, M)
        logits = logits - logits.detach().amax(1, keepdim=True)
        is_tagged = (query_tags != MIXED)[:, None]
        positive = is_tagged & (query_tags[:, None] == key_tags)

        copies, number = torch.ones_like(key_tags), len(key_tags)
        if twice is not None:
            copies, number = copies.index_fill_(0, twice, 2), number + len(twice)
        counted = copies * positive
        alike = (logits * counted).sum(1)

        with torch.no_grad():
            below = (copies * (logits * positive < alike[:, None] / number)).sum(1)
            # In the program: below / (number - below + 1e-6) > revise_ratio.
            revised = below > revise_ratio * (number + 1e-6) / (1 + revise_ratio)
            # The authors drop entries whose exponential is 1: the maximum, and what was set to zero.
            differs = logits != 0
            pairs = all_reduce_sum((counted * differs).sum(1).masked_fill(revised, 0).sum())

        spread = (logits.exp() * (copies * (is_tagged & (key_tags != MIXED) & differs))).sum(1)
        score = number * (spread + eps).log() - alike.masked_fill(revised, 0)
        counts = (spread > 0) & (pairs > 0)
        loss = (score.relu() * counts).mean() / pairs.clamp(min=1)
        return loss, query_tags.masked_fill(revised, 0)


def local_to_global_contrast(
    query: Tensor, prototypes: Tensor, query_tags: Tensor, temperature: float, eps: float = 1e-12
) -> Tensor:
    """Pull tokens to their class's prototype, away from those of other classes in the batch (SeCo, LIG).

    Args:
        query: (R, D) unit rows, with gradient.
        prototypes: (C, D) without gradient; row c stands for class c + 1.
        query_tags: (R,) int64; only rows with a class count, against the classes of the global batch.
        temperature: of the softmax.

    Returns:
        Scalar: mean over rows that have a class; 0 where there are none.
    """
    with full_precision(query):
        logits = query.float() @ prototypes.float().T / temperature  # (R, C)
        class_ids = positions(len(prototypes) + 1, query_tags.device)[1:]
        is_class = query_tags[:, None] == class_ids  # (R, C)
        absent = all_reduce_sum(is_class.sum(0)) == 0
        # log(S + eps) in logarithms: prototypes that were never updated have no fixed length, so exp could
        # overflow.
        compared = F.pad(logits.masked_fill(absent, -math.inf), (0, 1), value=math.log(eps))
        spread = torch.logsumexp(compared, 1, keepdim=True)
        return global_mean(((spread - logits) * is_class).sum(), is_class.sum(), offset=eps)
