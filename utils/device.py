"""Numbers of the host on a device, without waiting for it."""

from functools import cache, lru_cache

import torch
from torch import Tensor


@cache
def constant(values: tuple[float, ...], device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """A few numbers, copied once for each device; not to be changed."""
    return torch.tensor(values, dtype=dtype, device=device)


def positions(n: int, device: torch.device, dtype: torch.dtype = torch.int64, step: int = 1) -> Tensor:
    """0, step, ..., (n - 1) * step, made once for each device; not to be changed."""
    return _multiples(1 << (n - 1).bit_length(), step, device, dtype)[:n]


@lru_cache(maxsize=64)
def _multiples(n: int, step: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    return torch.arange(0, n * step, step, dtype=dtype, device=device)


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """A tensor of the CPU on a device; a GPU copies it from pinned memory, for which nobody waits."""
    if device.type == "cuda" and values.device != device:
        values = values.pin_memory()
    return values.to(device, non_blocking=True)
