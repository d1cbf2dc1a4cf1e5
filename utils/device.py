"""Numbers of the host on a device, without waiting for it."""

from __future__ import annotations

from functools import cache, lru_cache

import torch
from torch import Tensor


@cache
def constant(values: tuple[float, ...], device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """A few numbers, copied once for each device; not to be changed."""
    return torch.tensor(values, dtype=dtype, device=device)


@lru_cache(maxsize=32)
def positions(n: int, device: torch.device) -> Tensor:
    """0, 1, ..., n - 1, made once for each device; not to be changed."""
    return torch.arange(n, device=device)


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """A tensor of the CPU on a device; a GPU copies it from pinned memory, for which nobody waits."""
    if device.type == "cuda" and values.device != device:
        values = values.pin_memory()
    return values.to(device, non_blocking=True)
