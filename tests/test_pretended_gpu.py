"""Everything that runs on a GPU, on a pretended one: equal results, and a step that does not wait for it."""

from __future__ import annotations

import functools
import gc
import json
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import yaml
from omegaconf import OmegaConf
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing import assert_close

from engine import train
from engine.config.options import fill
from engine.config.schema import Infer
from engine.inference import load_method
from engine.segmentation import multi_scale_segment
from engine.trainer import Trainer
from methods.base import Method, Predicts, Propagates
from methods.seco import SeCo
from models.refiners.base import create_refiner
from tests.checkpoints import demo_folder  # noqa: F401
from tests.methods.demo import demo_batch, demo_method
from tests.pretended_gpu import DEVICE, pretended_gpu
from tests.trainings import TRAININGS, small_config
from utils.weights import load_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore:'pin_memory'")
BUDGETS = yaml.safe_load((Path(__file__).parent / "gpu_budgets.yaml").read_text())


def result(cfg):
    """Numbers of the last log line, of the validation, and the weights."""
    folder = Path(cfg.work_dir)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    kept = [{key: line[key] for key in ("loss", "val") if key in line} for line in lines]
    return kept, load_checkpoint(folder / "last.pth")["model"]


@contextmanager
def counted(gpu):
    """What pictures, the forward pass and the step from there on issue, and the lines where it waits."""
    counts, step, forward, batches = {}, Trainer._train_step, Method.forward, train.train_batches

    def counted_forward(self, *args):
        counts["pictures"] = gpu.operations.total()
        out = forward(self, *args)
        counts["forward"] = gpu.operations.total() - counts["pictures"]
        return out

    def counted_step(self, *args):
        gpu.clear()
        out = step(self, *args)
        counts["step"] = gpu.operations.total() - counts["pictures"]
        counts.update(syncs=gpu.syncs.total(), lines=dict(gpu.syncs))
        return out

    def pinned_batches(*args, on_gpu):
        for batch in batches(*args, on_gpu=on_gpu):
            yield {k: v.pin_memory() if on_gpu and isinstance(v, Tensor) else v for k, v in batch.items()}

    with (
        patch.object(Method, "forward", counted_forward),
        patch.object(Trainer, "_train_step", counted_step),
        patch.object(train, "train_batches", pinned_batches),
    ):
        yield counts


@pytest.fixture(scope="module", params=TRAININGS)
def runs(request, demo_folder, tmp_path_factory):  # noqa: F811
    """Config, counts of a step, results of a training on the CPU, on the GPU, and continued on the GPU."""
    folder = tmp_path_factory.mktemp(request.param)
    cfg = small_config(request.param, folder, demo_folder)
    (folder / "two.txt").write_text("test_00000\ntest_00001\n")
    cfg.data.val_set, cfg.train.checkpoint_every = str(folder / "two.txt"), 2
    on_cpu = OmegaConf.merge(cfg, {"work_dir": str(folder / "cpu"), "device": "cpu"})
    train.run(on_cpu)
    results = [result(on_cpu)]
    with pretended_gpu() as gpu:
        cfg.device = "cuda"
        with counted(gpu) as counts:
            train.run(cfg)
        results.append(result(cfg))
        last = Path(cfg.work_dir) / "last.pth"
        last.with_name("step_1.pth").replace(last)
        train.run(cfg)
        results.append(result(cfg))
    return cfg, counts, results


def test_training_and_resumed_training_give_what_the_cpu_gives(runs):
    _, _, ((lines, weights), *others) = runs
    for other_lines, other_weights in others:
        assert_close(other_weights, weights, rtol=1e-4, atol=1e-5)
        assert_close(other_lines[-2:], lines[-2:], rtol=1e-3, atol=1e-3)


def test_a_step_keeps_its_budget(runs):
    cfg, counts, _ = runs
    over = {key: counts[key] for key, most in BUDGETS[cfg.run_name].items() if counts[key] > most}
    assert not over, counts["lines"]


def on_both(work, *inputs):
    """The results of ``work(device, *inputs)`` on the CPU and on the GPU are equal."""
    expected = work("cpu", *inputs)
    with pretended_gpu():
        found = [x.cpu() for x in work(DEVICE, *(x.to(DEVICE) for x in inputs))]
    assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_inference_gives_what_the_cpu_gives(runs):
    """Multi-scale segmentation, CAMs, and the random walk from them."""
    path = Path(runs[0].work_dir) / "last.pth"

    def work(device, image, cam):
        method, found = load_method(path, device).method, []
        if isinstance(method, Predicts):
            out, infer = method.predict(image, (1.0, 0.5)), replace(fill(Infer, {}), scales=[1.0, 0.75])
            found += [x for x in vars(out).values() if x is not None]
            found += [] if out.seg_logits is None else [multi_scale_segment(method, image, infer)]
        return found + ([method.propagate(image, cam)] if isinstance(method, Propagates) else [])

    generator = torch.Generator().manual_seed(0)
    on_both(work, torch.randn(1, 3, 48, 40, generator=generator), torch.rand(2, 12, 10, generator=generator))


@pytest.mark.parametrize("name", ["par", "pamr", "dense_crf"])
def test_refiners_give_what_the_cpu_gives(name):
    image, scores = torch.rand(2, 3, 22, 19), torch.rand(2, 4, 22, 19).softmax(1)
    on_both(lambda device, *inputs: [create_refiner(name).refine(*inputs)], image, scores)


def test_what_fails_on_a_gpu_fails_here():
    with pretended_gpu() as gpu:
        values = torch.arange(4.0, device=DEVICE)
        with pytest.raises(RuntimeError, match="of the CPU and of cuda:0"):
            values + torch.ones(4)
        with pytest.raises(TypeError, match="NumPy"):
            values.numpy()
        assert not gpu.syncs
        assert values[values > 1].sum().item() == 5 and torch.tensor([1.0], device=DEVICE).is_cuda
        assert sorted(where.split(" at ")[0] for where in gpu.syncs) == [
            "_local_scalar_dense", "boolean index", "copy from the host",
        ]  # fmt: skip


@pytest.fixture
def no_constants():
    """What was made once for each device is forgotten, before and after."""
    caches = [f for f in gc.get_objects() if isinstance(f, functools._lru_cache_wrapper)]
    ours = [f for f in caches if f.__module__.split(".")[0] in ("losses", "models", "ops", "utils")]
    for cached in ours:
        cached.cache_clear()
    yield
    for cached in ours:
        cached.cache_clear()


def test_no_number_decides_what_a_step_does(monkeypatch, no_constants):
    """Torch's own tensors without numbers go through the whole forward pass on ``cuda``."""
    monkeypatch.setattr(torch.cuda, "_lazy_init", lambda: None)
    monkeypatch.setattr("ops.crops.to_device", lambda values, device: values.to(device))
    method, batch = demo_method(SeCo), demo_batch() | {"most_classes": 2, "sample_seed": [0, 1, 2]}
    with FakeTensorMode(allow_non_fake_inputs=True):
        method.to(DEVICE)
        batch = {key: x.to(DEVICE) if isinstance(x, Tensor) else x for key, x in batch.items()}
        losses, _ = method(batch, 10**6)
    assert {loss.device for loss in losses.values()} == {DEVICE}
