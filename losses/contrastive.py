"""Contrastive losses on class tokens.

B images, V student views (two global views first), D projection size.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from utils.precision import full_precision


def class_token_contrast(
    student: Tensor, teacher: Tensor, is_positive: Tensor, temperature: float, eps: float = 1e-4
) -> Tensor:
    """Pull global views to crops that show an object, push them from the others (ToCo).

    Per image and teacher view a, with z_j = exp(teacher_a . student_j / T) and N the sum of z over negative
    views:

        sum over positive j of -log(z_j / (z_j + N + eps))  -  log(1 / (1 + N + eps)),

    divided by the number of positives. The last term is in the authors' code (a loop ``else``), not in the
    paper. A teacher view is also paired with the same student view. No normaliser depends on other images.

    Args:
        student: (V * B, D) view-major, not normalised.
        teacher: (2 * B, D) view-major, without gradient.
        is_positive: (B, V), nonzero where the view shows an object; the global views always do.
        temperature: T.

    Returns:
        Mean over images.
    """
    with full_precision(student):
        images, views = is_positive.shape
        student = student.float().view(views, images, -1)
        teacher = teacher.float().view(-1, images, student.shape[-1])
        logits = torch.einsum("aid,jid->iaj", teacher, student) / temperature  # (B, 2, V)
        positive = is_positive.bool()[:, None]  # (B, 1, V)
        # log(N + eps). In logarithms nothing overflows: the projections have no fixed length.
        floor = logits.new_full((*logits.shape[:2], 1), math.log(eps))
        negatives = torch.logsumexp(
            torch.cat([logits.masked_fill(positive, -math.inf), floor], -1), -1, keepdim=True
        )
        pull = (F.softplus(negatives - logits) * positive).sum(-1)  # (B, 2)
        push = F.softplus(negatives).squeeze(-1)
        return ((pull + push).sum(1) / 2 / (positive.sum((1, 2)) + eps)).mean()
