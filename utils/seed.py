"""Random numbers that belong to a sample, not to the process or worker that happens to draw them."""

import os
import random
import zlib

import numpy as np
import torch


def seed_everything(seed: int, deterministic: bool) -> None:
    """Seed Python, NumPy and torch, and switch torch to deterministic algorithms where asked for."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    if deterministic:
        # cuBLAS reads this when its first handle is created.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False


def seed_process(seed: int, step: int, rank: int) -> None:
    """Give torch's generators of every process but the first a state of its own, from ``step`` on.

    Otherwise dropout and gates would draw equal masks on all processes.
    """
    if rank > 0:
        torch.manual_seed(sample_seed(seed, step, rank))


def sample_seed(seed: int, epoch: int, index: int) -> int:
    """The seed of everything drawn for one sample in one epoch, in [0, 2**63)."""
    return _state(seed, epoch, index)


def sample_generator(sample_seed: int, purpose: str) -> torch.Generator:
    """A CPU generator for one sample; streams for different purposes are independent of each other."""
    return torch.Generator().manual_seed(_state(int(sample_seed), zlib.crc32(purpose.encode())))


def _state(*entropy: int) -> int:
    return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0]) >> 1
