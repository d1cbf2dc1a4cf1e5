"""Mixed precision: where it is used, and where it stops.

Labels, activation maps, refiners and losses are float32.
"""

import torch
from torch import Tensor

from utils.logging import warn_once


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The mixed-precision context of a device.

    Args:
        precision: ``fp32``, ``bf16``, or ``auto``: bf16 on a GPU that computes in it, else fp32.
    """
    if precision == "auto":
        precision = "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "fp32"
    if precision == "bf16" and device.type == "cpu" and not torch.cpu._is_avx512_bf16_supported():
        warn_once("precision=bf16: this CPU has no bf16 arithmetic (AVX512-BF16, AMX), fp32 is faster on it")
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")


def full_precision(tensor: Tensor) -> torch.autocast:
    """A context without autocast on the device of ``tensor``; inputs still need ``.float()``."""
    return torch.autocast(tensor.device.type, enabled=False)
