"""Labels and losses of pixel pairs."""

import torch
from torch.testing import assert_close

from losses.affinity import pair_affinity_loss, pair_displacement_loss, pair_label
from ops.pairs import PathPairs, PixelPairs


def random_label(*shape):
    """Classes 0..3, and 255."""
    label = torch.randint(0, 5, shape, generator=torch.Generator().manual_seed(0))
    return label.masked_fill(label == 4, 255)


def test_a_pair_is_of_one_kind_or_ignored():
    pairs, map_ = PixelPairs(4), random_label(2, 12, 13)
    label = torch.stack(pair_label(map_, pairs)).sum(0)
    ignored = (pairs.source(map_)[:, None] == 255) | (pairs.destination(map_) == 255)
    assert torch.equal(label == 1, ~ignored) and label.max() == 1


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


def test_displacements_to_one_place_cost_nothing():
    pairs = PathPairs(5)
    grid = torch.stack(torch.meshgrid(torch.arange(12.0), torch.arange(14.0), indexing="ij"))
    to_centre = (torch.tensor([5.0, 6.0])[:, None, None] - grid)[None]
    one_object = pair_label(torch.full((1, 12, 14), 3), pairs)
    background = pair_label(torch.zeros(1, 12, 14, dtype=torch.long), pairs)
    assert pair_displacement_loss(to_centre, one_object, pairs)["dp_fg"] == 0
    assert pair_displacement_loss(to_centre, background, pairs)["dp_bg"] > 0.5
    constant = torch.full_like(to_centre, 2.5)
    assert pair_displacement_loss(constant, background, pairs)["dp_bg"] == 0


def test_half_precision_affinities_are_summed_in_full():
    pairs = PixelPairs(5)
    label = pair_label(torch.zeros(4, 64, 64, dtype=torch.long), pairs)
    affinity = torch.full(label.neg.shape, 0.5, dtype=torch.bfloat16)
    loss = pair_affinity_loss(affinity, label)["bg_pos"]
    assert loss.dtype == torch.float32
    assert_close(loss, torch.tensor(0.5).log().neg(), rtol=1e-4, atol=0)
