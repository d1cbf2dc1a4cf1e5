"""What the CNN backbones share: maps, layers that stay as they were loaded, batch norms that never move."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import nn

from models.blocks import freeze_layers


class CNNBackbone(nn.Module):
    """Base of backbones that map images (B, 3, H, W) to a list of maps from shallow to deep."""

    dims: tuple[int, ...]  # channels of the maps
    strides: tuple[int, ...]  # pixels per position of the maps
    # Weight files: regular expressions of their names -> ours, prefixes of the ImageNet classifier, which is
    # left out, and prefixes of our layers that they do not have.
    file_names: tuple[tuple[str, str], ...] = ()
    classifier: tuple[str, ...] = ("fc.",)
    new_layers: tuple[str, ...] = ()
    stays_in_eval = False

    @property
    def shallow(self) -> int:
        """Index of the deepest map at stride 4, or the smallest there is, which decoders skip to."""
        return max(i for i, stride in enumerate(self.strides) if stride == min(self.strides))

    def group_matcher(self, coarse: bool = False) -> Callable[[str], int]:
        """Number of the layer that a parameter belongs to, in the form of timm's networks."""
        layers = [name for name, _ in self.named_children()]
        return lambda name: layers.index(name.partition(".")[0])

    def freeze(self, frozen: Sequence[str] | str, train_affine: bool) -> None:
        """Take the gradient from layers.

        Args:
            frozen: names of submodules, or ``all``: then the backbone also stays in eval mode.
            train_affine: whether scale and shift of the batch norms outside of ``frozen`` are trained. Their
                statistics are never.
        """
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.requires_grad_(train_affine)
        freeze_layers(self, frozen)
        self.stays_in_eval = frozen == "all"
        self.train(self.training)

    def train(self, mode: bool = True) -> CNNBackbone:
        """Training mode for everything but the batch norms, which always use the loaded statistics."""
        super().train(mode and not self.stays_in_eval)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        return self
