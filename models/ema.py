"""Momentum copies of modules."""

from __future__ import annotations

from copy import deepcopy

import torch
from torch import nn


def momentum_copy(module: nn.Module) -> nn.Module:
    """A copy that no optimiser changes; ``update_momentum_copy`` does."""
    return deepcopy(module).requires_grad_(False)


@torch.no_grad()
def update_momentum_copy(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """``teacher <- momentum * teacher + (1 - momentum) * student``, frozen parameters included."""
    slow, fast = list(teacher.parameters()), list(student.parameters())
    torch._foreach_mul_(slow, momentum)
    torch._foreach_add_(slow, fast, alpha=1 - momentum)
