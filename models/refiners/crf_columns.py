"""Which labels a DenseCRF computes: labels of equal energy share one column.

Labels with the same unary keep the same probability for ever, because Potts weights treat labels alike.
Absent classes, all clipped to one floor, therefore cost a single column, and the result is exact.

B images, L labels, C columns, N pixels of one image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Columns:
    """The columns of one or more unaries of the same images.

    Args:
        labels: (C,) a label that each column stands for. column: (L,) column of each label.
        groups: column range of each unary; probabilities add up to 1 in each.
        count: (C,) float number of labels in a column.
    """

    labels: list[int]
    column: list[int]
    groups: list[slice]
    count: Tensor

    @classmethod
    def of(cls, energy: Tensor, sizes: Sequence[int]) -> Columns:
        """Choose columns for energies (B, L, N), where L is made of groups of ``sizes``."""
        # Unequal labels usually differ in a few hundred pixels already: few pairs are compared in full.
        sample = energy[:, :, :: max(1, energy.shape[2] // 256)].transpose(0, 1).flatten(1).cpu().numpy()
        labels: list[int] = []
        column: list[int] = []
        groups: list[slice] = []
        for size in sizes:
            start = len(labels)
            alike: dict[bytes, list[int]] = {}  # columns by their sample
            for label in range(len(column), len(column) + size):
                candidates = alike.setdefault(sample[label].tobytes(), [])
                equal = (c for c in candidates if torch.equal(energy[:, label], energy[:, labels[c]]))
                found = next(equal, len(labels))
                if found == len(labels):
                    candidates.append(found)
                    labels.append(label)
                column.append(found)
            groups.append(slice(start, len(labels)))
        count = energy.new_tensor([column.count(c) for c in range(len(labels))])
        return cls(labels, column, groups, count)

    def select(self, energy: Tensor) -> Tensor:
        """(B, L, N) -> (B*N, C) energies above that of the best label; every softmax stays as it is."""
        energy = energy[:, self.labels]
        for group in self.groups:
            energy[:, group] -= energy[:, group].amin(1, keepdim=True)
        return energy.transpose(1, 2).reshape(-1, len(self.labels))

    def expand(self, q: Tensor) -> Tensor:
        """(B, N, C) -> (B, L, N)."""
        return q.transpose(1, 2)[:, self.column].contiguous()

    def softmax_(self, logits: Tensor, bounded: bool) -> Tensor:
        """Softmax over the labels of each group, in place on (n, C).

        torch.softmax takes up to ten times as long on a CPU for rows of fewer than 16 numbers.

        Args:
            bounded: exp of the logits as they are neither overflows nor vanishes.
        """
        if not bounded:
            for group in self.groups:
                logits[:, group] -= logits[:, group].amax(1, keepdim=True)
        logits.exp_()
        return logits.div_(self.sum(logits))

    def sum(self, values: Tensor) -> Tensor:
        """Sum (n, C) over the labels of each group: (n, 1), or (n, C) with the group's sum in each column."""
        if values.device.type == "cpu":  # a product is much faster there than a sum over a few columns
            if len(self.groups) == 1:
                return values @ self.count[:, None]
            weights = [self.count[g, None].expand(-1, g.stop - g.start) for g in self.groups]
            return values @ torch.block_diag(*weights)
        sums = [
            (values[:, g] * self.count[g]).sum(1, keepdim=True).expand(-1, g.stop - g.start)
            for g in self.groups
        ]
        return torch.cat(sums, dim=1)
