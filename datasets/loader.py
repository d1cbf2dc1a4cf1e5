"""Which samples make which step, and the loaders that fetch them."""

from __future__ import annotations

import atexit
import multiprocessing
import multiprocessing.util
import signal
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from datasets.base import WeakSegDataset, collate
from utils import distributed
from utils.seed import sample_generator, sample_seed


class StepSampler(Sampler[list[tuple[int, int]]]):
    """Endless micro-batches of (index, sample_seed) for one process: a pure function of seed and step.

    Step t takes items [t * batch_size, (t + 1) * batch_size) of a stream of shuffled epochs, whatever the
    number of processes, workers and micro-batches, so resuming needs nothing but the step. Each epoch leaves
    its last incomplete batch out; where the data set is smaller than a batch the epochs follow each other
    without a gap.

    Args:
        length: number of images.
        batch_size: images per step over all processes and micro-batches.
        seed: of the order and of the samples' own seeds.
        start_step: first step to yield.
        accumulate: micro-batches per step and process; the iterator yields this many lists per step.
        rank, world_size: this process; None: as torch.distributed says.

    Raises:
        ValueError: the batch cannot be divided equally over processes and micro-batches.
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        seed: int,
        start_step: int = 0,
        accumulate: int = 1,
        rank: int | None = None,
        world_size: int | None = None,
    ) -> None:
        self.rank = distributed.rank() if rank is None else rank
        self.world_size = distributed.world_size() if world_size is None else world_size
        if length < 1 or batch_size < 1 or accumulate < 1:
            raise ValueError(
                f"length {length}, batch_size {batch_size} and accumulate {accumulate} must be at least 1"
            )
        if batch_size % (self.world_size * accumulate):
            raise ValueError(
                f"train.batch_size={batch_size} (images per step over all processes) cannot be divided "
                "equally over "
                f"{self.world_size} processes x {accumulate} micro-batches: choose a multiple of "
                f"{self.world_size * accumulate}"
            )
        self.length = length
        self.batch_size = batch_size
        self.seed = seed
        self.start_step = start_step
        self.accumulate = accumulate
        self._epoch = -1
        self._order = torch.empty(0)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        part = self.batch_size // (self.world_size * self.accumulate)
        step = self.start_step
        while True:
            items = self.step_items(step)
            for micro_batch in range(self.accumulate):
                start = (micro_batch * self.world_size + self.rank) * part
                yield items[start : start + part]
            step += 1

    def step_items(self, step: int) -> list[tuple[int, int]]:
        """(index, sample_seed) of the whole batch of a step, over all processes."""
        small = self.length < self.batch_size
        used_per_epoch = self.length if small else self.length - self.length % self.batch_size
        positions = range(step * self.batch_size, (step + 1) * self.batch_size)
        return [self._item(*divmod(position, used_per_epoch)) for position in positions]

    def _item(self, epoch: int, position: int) -> tuple[int, int]:
        if epoch != self._epoch:
            # `length` is no image's index, so the order's seed is not shared with any sample.
            generator = sample_generator(sample_seed(self.seed, epoch, self.length), "order")
            self._epoch, self._order = epoch, torch.randperm(self.length, generator=generator)
        index = int(self._order[position])
        return index, sample_seed(self.seed, epoch, index)


def train_loader(
    dataset: Dataset[Any], sampler: StepSampler, num_workers: int, pin_memory: bool
) -> DataLoader[dict[str, Tensor]]:
    """Endless batches in the sampler's order, one per micro-batch, the same for any number of workers."""
    return DataLoader(
        dataset,
        batch_sampler=sampler,
        num_workers=num_workers,
        collate_fn=collate,
        pin_memory=pin_memory,
        worker_init_fn=_set_up_worker,
        # The loader draws its workers' base seed; a generator of its own leaves the global one alone.
        generator=torch.Generator(),
    )


def eval_loader(
    dataset: WeakSegDataset, num_workers: int, indices: Sequence[int]
) -> DataLoader[dict[str, Tensor]]:
    """The images of ``indices`` in that order, one per batch, at their own sizes."""
    return DataLoader(
        dataset,
        batch_size=1,
        sampler=list(indices),
        num_workers=num_workers,
        collate_fn=collate,
        worker_init_fn=_set_up_worker,
        generator=torch.Generator(),
    )


def _set_up_worker(_worker: int) -> None:
    # Several workers with a thread pool each would fight over the cores.
    torch.set_num_threads(1)
    # A terminal's Ctrl-C and a cluster's stop signal reach the workers too. The training process ends its
    # step and saves; for that it needs them. They end with it, however it ends: `_end_workers`.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def _end_workers() -> None:
    """When a process ends, also by an error: its workers do not hear the request to end; it would wait."""
    workers = [child for child in multiprocessing.active_children() if child.daemon]
    if workers:  # torch takes a worker's end for a crash and would say so
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for worker in workers:
        worker.kill()


# Called before multiprocessing's own exit function, which was registered when it was imported.
atexit.register(_end_workers)
