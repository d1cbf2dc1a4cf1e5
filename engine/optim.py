"""Optimisers (AdamW for ViTs, SGD for CNNs) and their schedule: linear warm-up, polynomial decay."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import SGD, AdamW, Optimizer


def build_optimizer(
    groups: Iterable[Mapping[str, Any]],
    *,
    name: str = "adamw",
    lr: float,
    weight_decay: float,
    betas: Sequence[float] = (0.9, 0.999),
    eps: float = 1e-8,
    momentum: float = 0.0,
) -> Optimizer:
    """The optimiser of a method's parameter groups; each group learns at ``lr * lr_scale``.

    Args:
        groups: mappings with ``name``, ``params``, ``lr_scale`` and, where it is not 1, ``decay_scale`` (of
            the weight decay). Frozen parameters are left out: they get neither update nor decay.
        weight_decay: of norms and biases too, as in the published ViT programs.
    """
    chosen = []
    for group in groups:
        if params := [p for p in group["params"] if p.requires_grad]:
            base, decay = lr * group["lr_scale"], weight_decay * group.get("decay_scale", 1.0)
            rates = {"lr": base, "base_lr": base, "weight_decay": decay}
            chosen.append({"name": group["name"], "params": params, **rates})
    on_gpu = all(p.device.type == "cuda" for group in chosen for p in group["params"])
    if name == "sgd":
        return SGD(chosen, lr=lr, momentum=momentum, weight_decay=weight_decay, fused=on_gpu)
    return AdamW(chosen, lr=lr, weight_decay=weight_decay, betas=(betas[0], betas[1]), eps=eps, fused=on_gpu)


def decayed_by_layer(
    groups: Iterable[Mapping[str, Any]], scales: Mapping[nn.Parameter, float]
) -> list[dict[str, Any]]:
    """Parameter groups, each divided by the further ``scales`` of learning rates (default 1)."""
    divided = []
    for group in groups:
        parts: dict[float, list[nn.Parameter]] = {}
        for parameter in group["params"]:
            parts.setdefault(scales.get(parameter, 1.0), []).append(parameter)
        divided += [
            {**group, "params": params, "lr_scale": group["lr_scale"] * scale}
            for scale, params in parts.items()
        ]
    return divided


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
