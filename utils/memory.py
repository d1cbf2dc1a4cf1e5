"""How the C library hands memory back to the system."""

from __future__ import annotations

import ctypes

# Numbers of mallopt(3) in glibc.
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4
MEBIBYTE = 1 << 20


def keep_freed_memory() -> bool:
    """Make the C library keep freed blocks for the next tensor; returns whether it is one that can.

    By default glibc returns every block of megabytes to the system as soon as it is free, and the next tensor
    is faulted in again page by page, which took a sixth of the CPU time of a SeCo step, and half of it with a
    second training beside it. The peak stays what it was; what was used once is given back at the end of the
    process.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    settings = {M_MMAP_MAX: 0, M_TRIM_THRESHOLD: 2**31 - 1, M_TOP_PAD: 64 * MEBIBYTE}
    return all([mallopt(option, value) == 1 for option, value in settings.items()])
