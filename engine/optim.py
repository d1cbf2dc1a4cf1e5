"""Optimiser and learning-rate schedule of the ViT single-stage family: AdamW, linear warm-up, polynomial
decay.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch.optim import AdamW


def build_optimizer(
    groups: Iterable[Mapping[str, Any]],
    *,
    lr: float,
    weight_decay: float,
    betas: tuple[float, float],
    eps: float,
) -> AdamW:
    """AdamW over a method's parameter groups; each group learns at ``lr * lr_scale``.

    Args:
        groups: mappings with ``name``, ``params`` and ``lr_scale``. Frozen parameters are left out: they get
            neither update nor decay.
        weight_decay: applied to every parameter, norms and biases included, as the published programs do.
    """
    chosen = []
    for group in groups:
        params = [p for p in group["params"] if p.requires_grad]
        if params:
            base = lr * group["lr_scale"]
            chosen.append({"name": group["name"], "params": params, "lr": base, "base_lr": base})
    on_gpu = all(p.is_cuda for group in chosen for p in group["params"])
    return AdamW(chosen, lr=lr, weight_decay=weight_decay, betas=(betas[0], betas[1]), eps=eps, fused=on_gpu)


def poly_warmup_factor(
    step: int, *, steps: int, warmup_steps: int, warmup_ratio: float, power: float
) -> float:
    """Share of the base learning rate that the update of ``step`` uses.

    Linear from ``warmup_ratio`` to 1 while ``step < warmup_steps``, then ``(1 - step / steps) ** power``. The
    decay is not offset by the warm-up, so the rate jumps down where the warm-up ends (as in the published
    schedules), and it stays at its last value from ``steps`` on.
    """
    if step < warmup_steps:
        return 1 - (1 - step / warmup_steps) * (1 - warmup_ratio)
    return (1 - min(step, steps - 1) / steps) ** power


def set_learning_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Set every group to ``factor`` times its base learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor
