"""The few collective operations that training and evaluation need, on torch.distributed.

Everything works without a process group too: one process is a world of size one.
"""

import os

import torch
import torch.distributed as dist
from torch import Tensor, nn


def is_distributed() -> bool:
    """Whether a process group is running."""
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """Index of this process among all of them."""
    return dist.get_rank() if is_distributed() else 0


def world_size() -> int:
    """Number of processes that train or evaluate together."""
    return dist.get_world_size() if is_distributed() else 1


def is_main() -> bool:
    """Whether this process writes logs, checkpoints and tables."""
    return rank() == 0


def barrier() -> None:
    """Wait for all processes."""
    if is_distributed():
        dist.barrier()


def default_device(device: str) -> str:
    """The name of a device that is there; ``auto`` is a GPU if there is one."""
    found = torch.cuda.device_count()
    if device == "auto":
        device = "cuda" if found else "cpu"
    try:
        named = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device must be auto, cpu, cuda or cuda:<index>, got '{device}'") from error
    needed = max(int(os.environ.get("LOCAL_WORLD_SIZE", 1)), (named.index or 0) + 1)
    if named.type == "cuda" and needed > found:
        raise ValueError(f"{needed} GPU(s) asked for, {found} found (CUDA_VISIBLE_DEVICES); or device=cpu")
    return device


def init_process_group(device: str) -> torch.device:
    """Join the processes that torchrun started and return the device of this one."""
    chosen = torch.device(default_device(device))
    if chosen.type == "cuda":
        if chosen.index is not None and int(os.environ.get("LOCAL_WORLD_SIZE", 1)) > 1:
            raise ValueError(f"device={device} is one GPU for several processes; use device=cuda")
        if chosen.index is None:
            chosen = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(chosen)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not is_distributed():
        if missing := [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]:
            raise ValueError(
                f"WORLD_SIZE without {', '.join(missing)}: unset WORLD_SIZE, or use run_train.sh"
            )
        dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
    return chosen


def shutdown() -> None:
    """Leave the process group, if there is one."""
    if is_distributed():
        dist.destroy_process_group()


def all_reduce_sum(value: Tensor) -> Tensor:
    """The sum of ``value`` over processes, without gradient."""
    total = value.detach()
    if is_distributed():
        total = total.clone()
        dist.all_reduce(total)
    return total


def all_reduce_mean(value: Tensor) -> Tensor:
    """The mean of ``value`` over processes, as a new tensor without gradient."""
    return all_reduce_sum(value) / world_size()


def global_mean(total: Tensor, count: Tensor | float, offset: float = 0.0) -> Tensor:
    """This process's share of a mean over the global batch.

    The engine averages gradients over processes; shares average to ``sum(total) / (sum(count) + offset)``, so
    that a batch gives the same gradient on four processes as on one.

    Args:
        total: scalar with gradient, summed over this process's part of the batch, of ``count`` items.
        offset: added to the global count; keeps an empty batch finite.
    """
    if is_distributed():
        count = all_reduce_sum(count if isinstance(count, Tensor) else total.new_tensor(count))
        total = total * world_size()
    return total / (count + offset)


def gather_batch(value: Tensor) -> Tensor:
    """Values of all processes, of equal shapes, along dim 0 in rank order, without gradient."""
    value = value.detach()
    if not is_distributed():
        return value
    value = value.contiguous()
    parts = [torch.empty_like(value) for _ in range(world_size())]
    dist.all_gather(parts, value)
    return torch.cat(parts)


@torch.no_grad()
def share_buffers(module: nn.Module) -> None:
    """Give every process the main one's buffers: batch norms count each process's own images."""
    if is_distributed():
        for buffer in module.buffers():
            dist.broadcast(buffer, 0)


def shard(length: int) -> range:
    """Indices of ``range(length)`` that belong to this process: every world-size-th one."""
    return range(rank(), length, world_size())
