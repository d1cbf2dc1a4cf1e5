"""Means of a training's numbers since its last log line."""

from collections.abc import Mapping

import torch
from torch import Tensor

from utils.distributed import all_reduce_mean


class Means:
    """Means of named scalars over steps; summed on the device, read once per log line."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}

    def add(self, values: Mapping[str, Tensor]) -> None:
        """The values of one step."""
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, torch.zeros((), device=self.device)) + value
            self.counts[name] = self.counts.get(name, 0) + 1

    def means(self) -> dict[str, float]:
        """Means over steps and processes."""
        return _over_processes({name: value / self.counts[name] for name, value in self.sums.items()})

    def clear(self) -> None:
        """Start anew."""
        self.sums, self.counts = {}, {}

    def state(self) -> dict[str, tuple[float, int]]:
        """Sum (a mean over processes) and count of each name; every process must call it."""
        return {name: (value, self.counts[name]) for name, value in _over_processes(self.sums).items()}

    def restore(self, state: Mapping[str, tuple[float, int]]) -> None:
        """Continue with the sums of a checkpoint."""
        self.sums = {name: torch.tensor(value, device=self.device) for name, (value, _) in state.items()}
        self.counts = {name: count for name, (_, count) in state.items()}


def _over_processes(values: Mapping[str, Tensor]) -> dict[str, float]:
    if not values:
        return {}
    return dict(zip(values, all_reduce_mean(torch.stack(list(values.values()))).tolist(), strict=True))
