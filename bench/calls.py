"""What bench/run.py measures.

B images, L labels or classes, H W pixels, h w nodes of the walk (a quarter of the pixels).
"""

import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from bench.run import Options
from datasets.base import Record, Sample, Split, WeakSegDataset, collate
from engine.config.load import load_config, to_plain
from engine.method import build_method
from engine.optim import build_optimizer
from engine.scores.base import ImagePrediction
from engine.scores.evaluation import Evaluation
from engine.trainer import batch_to_device
from losses.dense_energy import dense_energy_loss
from methods.base import Method
from models.refiners.compiled_crf import CompiledCRF
from models.refiners.dense_crf import DenseCRF
from models.refiners.random_walk import propagate_to_edge
from ops.lattice import PermutohedralLattice, bilateral_features
from ops.pairs import PathPairs

Calls = dict[str, Callable[[], Any]]


def photos(options: Options) -> Tensor:
    """(B, 3, H, W) in [0, 1]: the photo, or smooth colour fields, with some grain, of 256 levels."""
    random = np.random.RandomState(0)
    height, width = options.size
    images = []
    for _ in range(options.batch):
        if options.image:
            source = Image.open(options.image).convert("RGB")
        else:
            source = Image.fromarray(random.randint(0, 256, (12, 16, 3)).astype(np.uint8))
        pixels = np.asarray(source.resize((width, height), Image.Resampling.BICUBIC), dtype=np.float64)
        images.append((pixels + 3 * random.standard_normal(pixels.shape)).round().clip(0, 255))
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).div(255).float().to(options.device)


def coarse(options: Options, count: int, stride: int = 1) -> Tensor:
    """(B, count, H / stride, W / stride): normal noise, enlarged, as the logits of a network."""
    height, width = (-(-side // stride) for side in options.size)
    noise = 2.5 * torch.randn(options.batch, count, -(-height // 32) + 1, -(-width // 32) + 1)
    return F.interpolate(noise, (height, width), mode="bilinear").to(options.device)


def crf_calls(options: Options) -> Calls:
    """Our DenseCRF and pydensecrf's."""
    images, probs = photos(options), coarse(options, options.labels).softmax(1)
    crf = DenseCRF(options.preset, steps=options.steps)
    calls: Calls = {"lattice": lambda: crf.refine(images, probs)}
    if find_spec("pydensecrf") is not None:
        original = CompiledCRF(options.preset, steps=options.steps)
        calls = {"pydensecrf": lambda: original.refine(images, probs), **calls}
    return calls


def energy_calls(options: Options) -> Calls:
    """The filter, the loss on maps of this size with its gradient, and rloss's filter."""
    images, logits = photos(options) * 255, coarse(options, options.labels)
    probs = logits.softmax(1)
    label = torch.randint(0, 2, logits[:, 0].shape).mul(255).to(logits.device)
    logits.requires_grad_()

    def filtered() -> Tensor:
        lattice = PermutohedralLattice(bilateral_features(images, 50.0, 15.0))
        return lattice.filter(probs.flatten(2).transpose(1, 2).contiguous())

    def loss() -> tuple[Tensor, ...]:
        energy = dense_energy_loss(images, logits, label, sigma_xy=50.0, scale=1.0)
        return torch.autograd.grad(energy, logits)

    def rloss() -> np.ndarray:
        from bilateralfilter import bilateralfilter_batch

        values = probs.numpy()
        result = np.zeros_like(values).ravel()
        bilateralfilter_batch(images.numpy().ravel(), values.ravel(), result, *values.shape, 15.0, 50.0)
        return result

    calls: Calls = {"filter": filtered, "loss and gradient": loss}
    return {"rloss filter": rloss, **calls} if find_spec("bilateralfilter") is not None else calls


def walk_calls(options: Options) -> Calls:
    """IRN's walk of the CAMs of one image: ours, with the dense matrix, and with that matrix squared."""
    edge, cam = (
        coarse(options, 1, stride=4)[0, 0].sigmoid(),
        coarse(options, options.labels, stride=4)[0].sigmoid(),
    )
    calls: Calls = {
        "sparse": lambda: propagate_to_edge(cam, edge, exp_times=options.exp_times),
        "dense, products": lambda: dense_walk(cam, edge, options.exp_times),
    }
    if options.squaring:
        calls["dense, squaring"] = lambda: dense_walk(cam, edge, options.exp_times, squaring=True)
    return calls


def dense_walk(cam: Tensor, edge: Tensor, exp_times: int, squaring: bool = False) -> Tensor:
    """The (hw, hw) transition matrix of the authors' program, applied step by step, or squared."""
    height, width = edge.shape
    radius, beta = 5, 10
    pairs = PathPairs(radius)
    walled = F.pad(edge, (radius, radius, 0, radius), value=1.0)
    affinity = 1 - pairs.path_max(walled)
    src, dst = (index.to(edge.device) for index in pairs.indices((walled.shape[0], walled.shape[1])))
    # Numbers of the pixels without the border; -1 in it.
    inside = torch.arange(height * width, device=edge.device).view(height, width)
    number = F.pad(inside, (radius, radius, 0, radius), value=-1).flatten()
    rows, columns = number[src].expand_as(dst), number[dst]
    kept = (rows >= 0) & (columns >= 0)
    rows, columns, values = rows[kept], columns[kept], affinity[kept] ** beta
    transition = torch.eye(height * width, device=edge.device)
    transition[rows, columns] = values
    transition[columns, rows] = values
    transition /= transition.sum(0)
    walked = (cam * (1 - edge)).flatten(1)
    if squaring:
        for _ in range(exp_times):
            transition = transition @ transition
        return (walked @ transition).view(cam.shape)
    for _ in range(2**exp_times):
        walked = walked @ transition
    return walked.view(cam.shape)


def train_calls(options: Options) -> Calls:
    """A step of a training, with every loss on: its forward pass, with the backward pass, and all of it."""
    method, samples = training(options)
    method.to(options.device).train()
    batch = batch_to_device(
        collate([samples[i, i] for i in range(options.batch)]), torch.device(options.device)
    )
    cfg = to_plain(load_config(options.config).optim)
    kept = {key: cfg[key] for key in ("name", "lr", "weight_decay", "momentum")}
    optimizer = build_optimizer(method.parameter_groups(), **kept)

    def forward() -> Tensor:
        losses, _ = method(batch, LATE)
        return torch.stack([method.loss_weight(name, LATE) * loss for name, loss in losses.items()]).sum()

    def backward() -> None:
        optimizer.zero_grad(set_to_none=True)
        forward().backward()

    def step() -> None:
        backward()
        optimizer.step()

    return {"forward": forward, "forward, backward": backward, "step": step}


def data_calls(options: Options) -> Calls:
    """Views of samples of a training from a decoded photo, their changes, and torchvision's standard crop."""
    _, samples = training(options)
    read = samples.read((0, 0))
    device, seeds = torch.device(options.device), range(options.batch)
    standard = v2.Compose([v2.RandomResizedCrop(448), v2.RandomHorizontalFlip(), v2.PILToTensor()])

    def views() -> list[Sample]:
        return [samples.transformed(read | {"sample_seed": seed}) for seed in seeds]

    batch = collate(views())
    if device.type == "cuda":
        batch = {key: x.pin_memory() if isinstance(x, Tensor) else x for key, x in batch.items()}
    return {
        "views": views,
        "their changes": lambda: batch_to_device(batch, device),
        "torchvision, one crop": lambda: [standard(read["image"]) for _ in seeds],
    }


def training(options: Options) -> tuple[Method, WeakSegDataset]:
    """The method of a config for ``labels`` classes, drawn, and its samples of generated photos."""
    cfg = load_config(options.config)
    method = build_method(cfg, options.labels, pretrained=False)
    folder = Path(tempfile.mkdtemp())
    records = []
    for i, photo in enumerate(photos(options).cpu()):
        path = folder / f"{i}.png"
        Image.fromarray((255 * photo).round().byte().permute(1, 2, 0).numpy()).save(path)
        tags = sorted({1 + i % (options.labels - 1), 1 + (i + 1) % (options.labels - 1)})
        records.append(Record(str(i), path, None, tuple(tags)))
    split = Split("photos", tuple(str(k) for k in range(options.labels)), tuple(records))
    transform = method.train_transform(cfg.data.crop_size, tuple(cfg.data.scale_range))
    return method, WeakSegDataset(split, transform)


def evaluate_calls(options: Options) -> Calls:
    """The scores of a validation for a label image, and a confusion matrix by NumPy."""
    names, size = [str(k) for k in range(options.labels)], options.size
    evaluation = Evaluation(
        Split("masks", tuple(names), (Record("0", Path(), None, None),)), ("miou", "confusion")
    )
    mask, label = (coarse(options, options.labels)[0].argmax(0) for _ in range(2))
    mask[: size[0] // 20] = 255
    sample = {"name": "0", "mask": mask}

    def numpy() -> np.ndarray:
        truth, found = mask.numpy(), label.numpy()
        kept = truth != 255
        return np.bincount(truth[kept] * options.labels + found[kept], minlength=options.labels**2)

    return {"scores": lambda: evaluation.update(sample, ImagePrediction({"seg": label})), "NumPy": numpy}


LATE = 10**6  # a step at which every loss has its last weight
PARTS = {"crf": crf_calls, "energy": energy_calls, "walk": walk_calls} | {
    "train": train_calls,
    "data": data_calls,
    "evaluate": evaluate_calls,
}
