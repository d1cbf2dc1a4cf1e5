"""Inputs and weights of the recorded cases in tests/golden, rebuilt from names.

A name seeds NumPy's legacy generator, whose streams never change, through its CRC-32. So a recorded file
holds only what came out of the reference program, and any input can be made again, here or elsewhere.
"""

from __future__ import annotations

import zlib

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


def formula_array(name: str, shape, low: float | None = None, high: float | None = None) -> np.ndarray:
    """float32 array: standard normal, or uniform in [low, high)."""
    stream = np.random.RandomState(zlib.crc32(name.encode()))
    values = stream.standard_normal(shape) if low is None else stream.uniform(low, high, shape)
    return values.astype(np.float32)


def formula_weight(key: str, shape) -> np.ndarray:
    """The array that stands for a state-dict entry; activations stay bounded through a deep network."""
    shape = tuple(shape)
    if key.endswith("num_batches_tracked"):
        return np.zeros(shape, np.int64)
    x = formula_array(key, shape)
    if key.endswith("running_var"):
        return 1 + 0.1 * np.abs(x)
    if len(shape) <= 1:
        return 1 + 0.1 * x if key.endswith("weight") else 0.02 * x
    return x / np.float32(np.sqrt(int(np.prod(shape[1:]))))


class Formula:
    """Builders of inputs; a ``prefix`` in front of every name gives other inputs of the same kind."""

    def __init__(self, prefix: str = "") -> None:
        self.prefix = prefix

    def arr(self, name: str, shape, low: float | None = None, high: float | None = None) -> Tensor:
        return torch.from_numpy(formula_array(self.prefix + name, tuple(shape), low, high))

    def weight(self, key: str, shape) -> Tensor:
        return torch.from_numpy(np.asarray(formula_weight(self.prefix + key, shape)))

    def load_weights(self, module: torch.nn.Module, key_prefix: str = "") -> None:
        """Overwrite every entry of the state dict; integer buffers are truncated."""
        module.load_state_dict(
            {k: self.weight(key_prefix + k, v.shape).to(v.dtype) for k, v in module.state_dict().items()}
        )

    def ints(self, name: str, shape, n: int) -> Tensor:
        """int64, uniform over 0..n-1."""
        return self.arr(name, shape, 0.0, 1.0).mul(n).floor().long().clamp(max=n - 1)

    def multi_hot(self, name: str, b: int, c: int, p: float = 0.15) -> Tensor:
        return (self.arr(name, (b, c), 0.0, 1.0) < p).float()

    def smooth_cams(
        self, name: str, b: int, c: int, h: int, w: int, cell: int = 8, power: float = 1
    ) -> Tensor:
        """Maps (b, c, h, w) in [0, 1): coarse noise, enlarged, stretched, raised to a power."""
        grid = self.arr(name, (b, c, max(h // cell, 2), max(w // cell, 2)), 0.0, 1.0)
        x = F.interpolate(grid, size=(h, w), mode="bilinear", align_corners=False)
        x = x - x.amin((2, 3), keepdim=True)
        return (x / (x.amax((2, 3), keepdim=True) + 1e-5)) ** power

    def smooth_image(
        self, name: str, noise: str, b: int, h: int, w: int, cell: int, gain: float, grain: float
    ) -> Tensor:
        """Coarse normal noise, enlarged, times ``gain``, plus fine noise times ``grain``."""
        coarse = F.interpolate(self.arr(name, (b, 3, h // cell, w // cell)), size=(h, w), mode="bilinear")
        return gain * coarse + grain * self.arr(noise, (b, 3, h, w))

    def step_image(self, name: str, b: int, h: int, w: int) -> Tensor:
        return self.smooth_image(name, name + "/noise", b, h, w, 16, 1.2, 0.3).clamp(-1.8, 2.2)

    def permutation(self, name: str, n: int) -> Tensor:
        return torch.from_numpy(np.argsort(formula_array(self.prefix + name, (n,)), kind="stable"))

    def bernoulli(self, name: str, shape, p) -> Tensor:
        return (self.arr(name, shape, 0.0, 1.0) < p).float()

    def coordinate_image(self, name: str, b: int, h: int, w: int) -> Tensor:
        """Row number, column number, noise: crop positions can be read off the crops."""
        grid = torch.stack(torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")).float()
        return torch.cat([grid[None].repeat(b, 1, 1, 1), self.arr(name, (b, 1, h, w))], 1)

    def toy_cam_network(self, name: str, c: int):
        """Images -> ``(cam, aux_cam)`` by two 16x16 convolutions of stride 16."""
        cam, aux = (self.arr(name + part, (c, 3, 16, 16)) / 768**0.5 for part in ("/w", "/w_aux"))
        return lambda x: (F.conv2d(x, cam, stride=16), F.conv2d(x, aux, stride=16))


def stats(x: Tensor) -> Tensor:
    """What entries named ``*_stats`` hold: mean, population standard deviation, sum of absolute values."""
    x = x.detach().double()
    return torch.stack([x.mean(), x.std(unbiased=False), x.abs().sum()])
