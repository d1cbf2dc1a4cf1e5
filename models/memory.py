"""What contrastive methods remember between steps: momentum copies, class prototypes, a queue of keys."""

from collections.abc import Sequence
from copy import deepcopy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from utils.device import positions


def momentum_copy(module: nn.Module) -> nn.Module:
    """A copy that no optimiser changes; ``update_momentum_copy`` does."""
    return deepcopy(module).requires_grad_(False)


@torch.no_grad()
def update_momentum_copy(
    teachers: Sequence[nn.Module], students: Sequence[nn.Module], momentum: float
) -> None:
    """``teacher <- momentum * teacher + (1 - momentum) * student``, frozen parameters included."""
    slow, fast = ([p for module in modules for p in module.parameters()] for modules in (teachers, students))
    torch._foreach_mul_(slow, momentum)
    torch._foreach_add_(slow, fast, alpha=1 - momentum)


def moved_prototypes(prototypes: Tensor, tokens: Tensor, is_class: Tensor, momentum: float) -> Tensor:
    """Prototypes (C, D) after a moving average over ``tokens`` (N, D), one after the other; unit rows.

    Args:
        is_class: (N, C) float, a 1 at the row of each token's prototype, if it has one.
    """
    # All at once: a token is damped once more by every later token of its class.
    later = (is_class @ is_class.T).triu(1).sum(1)
    share = (1 - momentum) * momentum**later  # (N,)
    kept = momentum ** is_class.sum(0)  # (C,)
    return F.normalize(kept[:, None] * prototypes + (is_class * share[:, None]).T @ tokens, dim=1)


def enqueue_(queue: Tensor, tags: Tensor, pointer: Tensor, keys: Tensor, key_tags: Tensor) -> Tensor:
    """Write keys over the oldest ones of a ring; returns their places.

    Args:
        queue: (M, D), tags: (M, 1), pointer: (1,) int64 the next place; all three are changed.
        keys: (R, D), key_tags: (R,); of more than M keys the last M are kept.
    """
    size, number = len(queue), len(keys)
    kept = min(number, size)
    places = (pointer + positions(number, keys.device)[number - kept :]) % size
    queue.index_copy_(0, places, keys[-kept:])
    tags.index_copy_(0, places, key_tags[-kept:, None])
    pointer.add_(number).remainder_(size)
    return places
