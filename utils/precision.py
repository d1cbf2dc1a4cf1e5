"""Mixed precision: where it is used, and where it stops.

Labels, activation maps, refiners and losses are float32.
"""

from __future__ import annotations

import torch
from torch import Tensor


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The mixed-precision context of a device.

    Args:
        precision: ``fp32``, ``bf16``, or ``auto``: bf16 on a GPU that computes in it, else fp32.
    """
    if precision == "auto":
        precision = "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "fp32"
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")


def full_precision(tensor: Tensor) -> torch.autocast:
    """A context without autocast on the device of ``tensor``; inputs still need ``.float()``."""
    return torch.autocast(tensor.device.type, enabled=False)
