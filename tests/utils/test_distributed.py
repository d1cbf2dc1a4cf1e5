"""Shares of a global mean average to the mean of the whole batch, however it is split over processes."""

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from utils.distributed import all_reduce_sum, gather_batch, global_mean, shard, share_buffers


def test_one_process_is_a_world_of_one():
    total = torch.tensor(6.0, requires_grad=True)
    share = global_mean(total, 2, offset=1)
    assert share.item() == 2.0
    share.backward()
    assert abs(total.grad.item() - 1 / 3) < 1e-7
    assert list(shard(3)) == [0, 1, 2]


def _process(rank, port, queue):
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    values = [torch.tensor([1.0, 2.0, 3.0]), torch.tensor([10.0])][rank].requires_grad_()
    share = global_mean(values.sum(), torch.tensor(len(values)), offset=1)
    share.backward()
    norm = torch.nn.BatchNorm1d(1)
    norm.running_mean.fill_(rank + 5)
    share_buffers(norm)
    queue.put(
        (
            rank,
            share.item(),
            values.grad[0].item(),
            gather_batch(torch.tensor([[float(rank)]])).tolist(),
            all_reduce_sum(torch.tensor(rank + 1)).item(),
            list(shard(5)),
            norm.running_mean.item(),
        )
    )
    dist.barrier()
    dist.destroy_process_group()


def test_two_processes_share_one_mean(free_port):
    context = mp.get_context("spawn")
    queue = context.SimpleQueue()
    processes = [context.Process(target=_process, args=(rank, free_port, queue)) for rank in range(2)]
    for process in processes:
        process.start()
    results = sorted(queue.get() for _ in processes)
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    shares = [result[1] for result in results]
    assert abs(sum(shares) / 2 - 16 / 5) < 1e-6  # (1 + 2 + 3 + 10) / (4 + 1)
    assert all(
        abs(result[2] / 2 - 1 / 5) < 1e-7 for result in results
    )  # gradients are averaged over two processes
    assert results[0][3] == results[1][3] == [[0.0], [1.0]]
    assert results[0][4] == 3
    assert (results[0][5], results[1][5]) == ([0, 2, 4], [1, 3])
    assert results[0][6] == results[1][6] == 5  # the main process's statistics
