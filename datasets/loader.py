"""Which samples make which step, and the loaders that fetch them."""

import itertools
import signal
from collections.abc import Generator, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from datasets.base import Batch, Sample, WeakSegDataset, collate, with_changes
from utils import distributed
from utils.pool import core_count
from utils.seed import sample_generator, sample_seed


class StepSampler(Sampler[list[tuple[int, int]]]):
    """Endless micro-batches of (index, sample_seed) for one process: a pure function of seed and step.

    Step t takes items [t * batch_size, (t + 1) * batch_size) of a stream of shuffled epochs, whatever the
    number of processes, workers and micro-batches. Each epoch leaves its last incomplete batch out; where the
    data set is smaller than a batch the epochs follow each other without a gap.

    Args:
        batch_size: images per step over all processes and micro-batches, a multiple of their number.
        accumulate: micro-batches per step and process; the iterator yields this many lists per step.
        rank, world_size: this process; None: as torch.distributed says.
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
        assert length > 0 and batch_size % (self.world_size * accumulate) == 0  # engine/checks.py
        self.length, self.batch_size, self.seed = length, batch_size, seed
        self.start_step, self.accumulate = start_step, accumulate
        self._epoch, self._order = -1, torch.empty(0)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        part = self.batch_size // (self.world_size * self.accumulate)
        for step in itertools.count(self.start_step):
            items = self.step_items(step)
            for micro_batch in range(self.accumulate):
                start = (micro_batch * self.world_size + self.rank) * part
                yield items[start : start + part]

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


def train_batches(
    dataset: Dataset[Any], sampler: StepSampler, num_workers: int, on_gpu: bool
) -> Generator[Batch, None, None]:
    """Endless batches in the sampler's order, one per micro-batch, the same for any number of workers.

    The workers ignore a stop signal, for the step that the training finishes needs them. They end when this
    generator is closed.

    Args:
        on_gpu: the batches are for a GPU: in pinned memory, and changes of their pictures are left to it.
    """
    options = {"pin_memory": on_gpu, "worker_init_fn": _set_up_training_worker}
    collate_fn = partial(_collate, on_gpu)
    loader = _loader(dataset, num_workers, batch_sampler=sampler, collate_fn=collate_fn, **options)
    batches: Any = iter(loader)
    try:
        yield from batches
    finally:
        if num_workers:
            batches._shutdown_workers()  # torch has no public way; an exception keeps the iterator alive


def eval_loader(dataset: WeakSegDataset, num_workers: int, indices: Sequence[int]) -> DataLoader[Sample]:
    """The samples of ``indices`` in that order, at their own sizes."""
    options = {"collate_fn": _shared, "worker_init_fn": _set_up_worker}
    return _loader(dataset, num_workers, batch_size=None, sampler=list(indices), **options)


def _loader(dataset: Dataset[Any], num_workers: int, **options: Any) -> DataLoader[Any]:
    # The loader draws its workers' base seed; a generator of its own leaves the global one alone.
    workers = min(num_workers, core_count())
    return DataLoader(dataset, num_workers=workers, generator=torch.Generator(), **options)


def _set_up_worker(_worker: int) -> None:
    # torch gives each worker one thread. Ctrl-C ends the main process, which ends its workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _set_up_training_worker(worker: int) -> None:
    _set_up_worker(worker)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _collate(on_gpu: bool, samples: Sequence[Any]) -> Batch:
    batch = collate(samples)
    return _shared(batch if on_gpu else with_changes(batch))


def _shared(batch: Batch) -> Batch:
    """A batch, or a sample, in a worker already in shared memory.

    Otherwise torch moves it there in a thread of the worker, whose error never reaches the main process.
    """
    if get_worker_info() is not None:
        try:
            for value in batch.values():
                if isinstance(value, Tensor):
                    value.share_memory_()
        except RuntimeError as error:
            raise ValueError(
                "/dev/shm is too small: start the container with --shm-size=8g, or set num_workers=0"
            ) from error
    return batch
