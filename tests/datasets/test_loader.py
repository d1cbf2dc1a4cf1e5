"""Which samples make which step, whatever loads them."""

import multiprocessing
from itertools import islice

import numpy as np
import pytest
import torch
from PIL import Image

from datasets.base import Record, Split, WeakSegDataset
from datasets.loader import StepSampler, eval_loader, train_batches
from datasets.transforms import PlainView, WeakStrongViews


@pytest.fixture
def split(tmp_path):
    rng = np.random.default_rng(0)
    records = []
    for k in range(7):
        path = tmp_path / f"{k}.png"
        Image.fromarray(rng.integers(0, 256, (20, 16 + k, 3), dtype=np.uint8)).save(path)
        records.append(Record(str(k), path, None, (1,)))
    return Split("train", ("background", "x"), tuple(records))


def steps(count, **options):
    """All items of the first steps, over every process and micro-batch in the order of the global batch."""
    world_size, accumulate = options.setdefault("world_size", 1), options.setdefault("accumulate", 1)
    samplers = [StepSampler(**options, rank=rank) for rank in range(world_size)]
    streams = [list(islice(sampler, count * accumulate)) for sampler in samplers]
    return [
        [item for a in range(accumulate) for stream in streams for item in stream[step * accumulate + a]]
        for step in range(count)
    ]


@pytest.mark.parametrize("length", [3, 8, 21])
@pytest.mark.parametrize(("world_size", "accumulate"), [(2, 1), (4, 1), (1, 4), (2, 2), (8, 1)])
def test_any_division_makes_the_same_global_batches_wherever_it_starts(length, world_size, accumulate):
    options = {"length": length, "batch_size": 8, "seed": 1}
    division = {"world_size": world_size, "accumulate": accumulate}
    assert steps(4, **options, **division, start_step=7) == steps(11, **options)[7:]


def test_an_epoch_visits_no_image_twice():
    batches = steps(10, length=21, batch_size=4, seed=0)
    first, second = ([index for batch in part for index, _ in batch] for part in (batches[:5], batches[5:]))
    assert len(set(first)) == len(first) == len(set(second)) == 20
    assert first != second and max(first + second) < 21


def test_epochs_of_a_small_set_follow_each_other_without_a_gap():
    items = [item for batch in steps(6, length=3, batch_size=4, seed=0) for item in batch]
    epochs = [items[k : k + 3] for k in range(0, 24, 3)]
    assert all({index for index, _ in epoch} == {0, 1, 2} for epoch in epochs)
    assert len({seed for _, seed in items}) == 24


@pytest.mark.parametrize("transform", [PlainView(16), WeakStrongViews(16)])
def test_batches_do_not_depend_on_workers(split, transform):
    def batches(num_workers):
        data = WeakSegDataset(split, transform)
        return list(islice(train_batches(data, StepSampler(7, 3, 5), num_workers, on_gpu=False), 4))

    plain = batches(0)
    assert plain[0]["image"].shape == (3, 3, 16, 16) and plain[0]["class_label"].shape == (3, 1)
    assert plain[0]["valid_box"].shape == (3, 4)
    for num_workers in (1, 2):
        for one, other in zip(plain, batches(num_workers), strict=True):
            assert one.keys() == other.keys() and one["name"] == other["name"]
            assert all(torch.equal(one[key], other[key]) for key in one if key != "name")


def test_loading_leaves_the_global_generator_and_no_process(split):
    state = torch.get_rng_state()
    data = WeakSegDataset(split, PlainView(16))
    batches = train_batches(data, StepSampler(7, 3, 5), 1, on_gpu=False)
    next(batches)
    (worker,) = multiprocessing.active_children()
    worker.terminate()  # as a stop signal to the whole group: the step that is trained needs it
    next(batches)
    batches.close()
    assert torch.equal(torch.get_rng_state(), state)
    assert not multiprocessing.active_children()


def test_workers_without_shared_memory_are_an_error_instead_of_a_wait(split, monkeypatch):
    def full(tensor):
        raise RuntimeError("unable to allocate shared memory(shm): No space left on device (28)")

    monkeypatch.setattr(torch.Tensor, "share_memory_", full)
    with pytest.raises(ValueError, match=r"--shm-size.*num_workers=0"):
        next(iter(eval_loader(WeakSegDataset(split), 1, [0])))


def test_evaluation_yields_one_image_at_its_size(split):
    for num_workers in (0, 1):
        samples = list(eval_loader(WeakSegDataset(split), num_workers, [5, 0]))
        assert [tuple(sample["image"].shape) for sample in samples] == [(3, 20, 21), (3, 20, 16)]
        assert [sample["name"] for sample in samples] == ["5", "0"]
