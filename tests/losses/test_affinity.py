"""Labels and losses of pixel pairs."""

import torch
from torch.testing import assert_close

from losses.affinity import pair_affinity_loss, pair_displacement_loss, pair_label
from ops.pairs import PathPairs, PixelPairs


def test_ignored_pairs_have_no_gradient_and_an_empty_label_no_loss():
    pairs = PathPairs(3)
    map_ = torch.full((1, 8, 8), 255)
    label = pair_label(map_, pairs)
    affinity = torch.full(label.neg.shape, 0.3, requires_grad=True)
    displacement = torch.randn(1, 2, 8, 8, requires_grad=True)
    losses = pair_affinity_loss(affinity, label) | pair_displacement_loss(displacement, label, pairs)
    assert all(loss == 0 for loss in losses.values())
    sum(losses.values()).backward()
    assert not affinity.grad.any() and not displacement.grad.any()


def test_half_precision_affinities_are_summed_in_full():
    pairs = PixelPairs(5)
    label = pair_label(torch.zeros(4, 64, 64, dtype=torch.long), pairs)
    affinity = torch.full(label.neg.shape, 0.5, dtype=torch.bfloat16)
    loss = pair_affinity_loss(affinity, label)["bg_pos"]
    assert loss.dtype == torch.float32
    assert_close(loss, torch.tensor(0.5).log().neg(), rtol=1e-4, atol=0)
