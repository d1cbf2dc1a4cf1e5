"""Training repeats itself to the bit whatever the loader's workers, does not depend on how a batch is split,
and leaves nothing behind.

``bash run_tests.sh --all tests/faults`` does so for every method and 300 steps.
"""

import gc
import os
import resource
import sys
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from datasets.base import WeakSegDataset
from datasets.loader import StepSampler, train_batches
from datasets.transforms import PlainView
from engine.train import run as train
from tests.engine.test_trainer import OPTIONS, records, trainer
from tests.processes import in_a_group
from tests.test_launch import assert_same_run, go_on, one_of_the_processes
from tests.trainings import TRAININGS, small_config
from utils.weights import load_checkpoint


def finished(folder, name, root, steps, workers):
    """Weights and records of a run."""
    cfg = small_config(name, folder, root)
    cfg.device, cfg.data.num_workers, cfg.data.val_set = "cpu", workers, None
    cfg.train |= {"steps": steps, "batch_size": 4, "log_every": 1, "threads": 1}
    train(cfg)
    return load_checkpoint(folder / "run" / "last.pth")["model"], records(folder / "run")


@pytest.mark.parametrize("name", TRAININGS)
def test_a_training_repeats_itself_to_the_bit_whatever_the_workers(demo_folder, tmp_path, at_length, name):
    if name != "CAMNetwork" and not at_length:
        pytest.skip("with --all")
    steps = 300 if at_length else 2
    whole, alone = finished(tmp_path / "0", name, demo_folder, steps, 0)
    parts, helped = finished(tmp_path / "2", name, demo_folder, steps, 2)
    torch.testing.assert_close(parts, whole, rtol=0, atol=0)
    assert helped == alone


def test_how_a_batch_is_split_over_processes_changes_nothing(demo, tmp_path, at_length):
    """1 x 4 = 2 x 2 = 4 x 1 images after 20 steps; tests/test_launch.py compares 1 x 4 and 2 x 2 after 4."""
    if not at_length:
        pytest.skip("with --all")
    demo = [*demo, "train.steps=20"]
    go_on(demo, tmp_path / "1")
    for size in (2, 4):
        in_a_group(one_of_the_processes, demo, tmp_path / str(size), size=size)
        assert_same_run(tmp_path / str(size), tmp_path / "1")


def usage():
    """Memory (MiB) of this process and its children, their number, and open files and shared memory."""
    tasks = Path("/proc/self/task").iterdir()
    children = [int(pid) for task in tasks for pid in words(task / "children")]
    pages = [int(words(f"/proc/{pid}/statm")[1]) for pid in (os.getpid(), *children)]
    shared = [line for line in Path("/proc/self/maps").read_text().splitlines() if "/dev/shm" in line]
    return {
        "memory": sum(pages) * resource.getpagesize() / 2**20,
        "children": len(children),
        "files": len(os.listdir("/proc/self/fd")),
        "shared": len(shared),
    }


def words(path):
    return Path(path).read_text().split()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_files_processes_and_shared_memory_are_flat_and_gone_at_the_end(split, tmp_path, at_length):
    steps = 2000 if at_length else 60
    seen = {}

    def source(first):
        sampler = StepSampler(len(split), 4, seed=0)
        data = WeakSegDataset(split, PlainView(32, (0.5, 2.0)))
        with closing(train_batches(data, sampler, 2, on_gpu=False)) as loaded:
            for step, batch in enumerate(loaded):
                if step in (steps // 3, steps - 1):
                    seen[step] = usage()
                yield {"image": batch["image"].float().mean((2, 3)), "sample_seed": batch["sample_seed"]}

    before = usage()
    options = replace(OPTIONS, steps=steps, checkpoint_every=steps // 20, log_every=steps // 20)
    trainer(tmp_path / "run", source, options=options).fit()
    gc.collect()
    early, late, after = seen[steps // 3], seen[steps - 1], usage()
    # One or two batches more may be on their way from the workers; a file for each step would be 40 more.
    assert late["memory"] - early["memory"] < 32 and late["files"] - early["files"] < 20
    assert early["children"] == late["children"] == before["children"] + 2
    assert late["shared"] - early["shared"] < 20
    assert after["children"] <= before["children"] and after["files"] <= before["files"]
    assert after["shared"] <= before["shared"] + 1  # the last batch


@pytest.mark.parametrize("key", ["train_set", "val_set"])
def test_a_start_without_its_images_leaves_no_folder(key, demo_folder, tmp_path):
    cfg = small_config("ToCo", tmp_path, demo_folder)
    cfg.data[key] = "nowhere"
    with pytest.raises(FileNotFoundError, match="nowhere"):
        train(cfg)
    assert not (tmp_path / "run").exists()
