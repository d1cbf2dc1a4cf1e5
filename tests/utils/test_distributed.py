"""Shares of a global mean average to the mean of the whole batch, however it is split over processes."""

import pytest
import torch

from tests.processes import in_a_group
from utils.distributed import (
    all_reduce_sum,
    gather_batch,
    global_mean,
    init_process_group,
    shard,
    share_buffers,
)


def test_one_process_is_a_world_of_one():
    total = torch.tensor(6.0, requires_grad=True)
    share = global_mean(total, 2, offset=1)
    assert share.item() == 2.0
    share.backward()
    assert abs(total.grad.item() - 1 / 3) < 1e-7
    assert list(shard(3)) == [0, 1, 2]


def one_of_two(rank):
    init_process_group("cpu")
    values = [torch.tensor([1.0, 2.0, 3.0]), torch.tensor([10.0])][rank].requires_grad_()
    share = global_mean(values.sum(), torch.tensor(len(values)), offset=1)
    share.backward()
    norm = torch.nn.BatchNorm1d(1)
    norm.running_mean.fill_(rank + 5)
    share_buffers(norm)
    return {
        "share": share.item(),
        "gradient": values.grad[0].item(),
        "ranks": gather_batch(torch.tensor([[float(rank)]])).tolist(),
        "sum": all_reduce_sum(torch.tensor(rank + 1)).item(),
        "shard": list(shard(5)),
        "running_mean": norm.running_mean.item(),
    }


def test_two_processes_share_one_mean():
    first, second = in_a_group(one_of_two)
    assert abs((first["share"] + second["share"]) / 2 - 16 / 5) < 1e-6  # (1 + 2 + 3 + 10) / (4 + 1)
    for result in (first, second):
        assert abs(result["gradient"] / 2 - 1 / 5) < 1e-7  # gradients are averaged over two processes
        assert result["ranks"] == [[0.0], [1.0]] and result["sum"] == 3
        assert result["running_mean"] == 5  # the main process's statistics
    assert (first["shard"], second["shard"]) == ([0, 2, 4], [1, 3])


def test_world_size_without_the_rest_is_an_error(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(ValueError, match="unset WORLD_SIZE"):
        init_process_group("cpu")
