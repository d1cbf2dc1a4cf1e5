"""What bench/run.py measures.

B images, L labels or classes, H W pixels, h w nodes of the walk (a quarter of the pixels).
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from bench.run import Options
from losses.dense_energy import dense_energy_loss
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
        calls = {"pydensecrf": lambda: pydensecrf(crf, images, probs), **calls}
    return calls


def pydensecrf(crf: DenseCRF, images: Tensor, probs: Tensor) -> list[np.ndarray]:
    """The compiled original."""
    import pydensecrf.densecrf as dcrf

    results = []
    for image, prob in zip(images, probs):
        labels, height, width = prob.shape
        original = dcrf.DenseCRF2D(width, height, labels)
        original.setUnaryEnergy(np.ascontiguousarray(-prob.clamp(1e-5, 1).log().flatten(1).numpy()))
        original.addPairwiseGaussian(sxy=crf.gaussian_sigma_xy, compat=crf.gaussian_compat)
        original.addPairwiseBilateral(
            sxy=crf.bilateral_sigma_xy,
            srgb=crf.bilateral_sigma_rgb,
            rgbim=np.ascontiguousarray((image * 255).round().byte().permute(1, 2, 0).numpy()),
            compat=crf.bilateral_compat,
        )
        results.append(np.array(original.inference(crf.steps)))
    return results


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


PARTS = {"crf": crf_calls, "energy": energy_calls, "walk": walk_calls}
