"""What the CNN backbones share: which layers stay as they were loaded, and batch norms that never move.

A CNN backbone maps images (B, 3, H, W) to a list of maps from shallow to deep. ``dims`` are their channels,
``shallow`` is the index of the map at stride 4 that decoders skip to; the last map is the deep one.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from models.blocks import freeze_layers


class CNNBackbone(nn.Module):
    """Base of backbones that return a list of maps."""

    dims: tuple[int, ...]
    shallow: int
    # How weight files name things: (regular expression, replacement) to our names,
    file_names: tuple[tuple[str, str], ...] = ()
    # prefixes of the ImageNet classifier, which is left out,
    classifier: tuple[str, ...] = ("fc.",)
    # and prefixes of our layers that they do not have.
    new_layers: tuple[str, ...] = ()
    stays_in_eval = False

    def freeze(self, frozen: Sequence[str] | str, train_affine: bool) -> None:
        """Take the gradient from layers.

        Args:
            frozen: names of submodules, or ``all``: then the backbone also stays in eval mode.
            train_affine: whether scale and shift of the batch norms outside of ``frozen`` are trained. Their
                statistics are never.

        Raises:
            ValueError: if there is no such submodule.
        """
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.requires_grad_(train_affine)
        freeze_layers(self, frozen)
        self.stays_in_eval = frozen == "all"
        self.train(self.training)

    def train(self, mode: bool = True) -> CNNBackbone:
        """Training mode for everything but the batch norms: they always normalise with the loaded
        statistics."""
        super().train(mode and not self.stays_in_eval)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        return self
