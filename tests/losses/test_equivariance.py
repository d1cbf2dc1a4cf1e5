"""SEAM's losses: the authors' values, and what must hold for any maps."""

import pytest
import torch
from torch.testing import assert_close

from losses.equivariance import (
    equivariant_cross_regularization,
    equivariant_regularization,
    max_norm,
    min_pool_loss,
    strongest_only,
    with_background,
)
from tests.recorded import recorded


@recorded("ms_seam_functions")
def test_functions_match_reference_values_and_gradients(case):
    x, w = case.input("x").requires_grad_(), case.input("w")
    stride, shift = case.noted(r"channel stride (\d+)", 4), case.noted(r"\(x-([\d.]+)\)", 1.2)
    normed, loss, kept = max_norm(x), min_pool_loss(x[:, 1:]), strongest_only(x)
    found = {
        "max_norm": normed[:, ::stride],
        "max_norm_numpy": normed[:, ::stride],
        "max_norm_3d": max_norm(x[0])[::stride],
        "max_norm_grad": torch.autograd.grad((normed * w).sum(), x)[0][:, ::stride],
        "minpool": loss,
        "minpool_grad_sum_over_channels": torch.autograd.grad(loss, x)[0].sum(1),
        "minpool_shifted": min_pool_loss(x[:, 1:] - shift),
        "max_onehot": kept[:, ::stride],
        "max_onehot_count": (kept[:, 1:] != 0).sum(),
    }
    for name, value in found.items():
        case.compare(name, value, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("value", [0.0, -1.0])
def test_maps_without_activation_stay_empty(value):
    maps = torch.full((2, 3, 5, 4), value, requires_grad=True)
    total = max_norm(maps).sum() + min_pool_loss(maps)
    total.backward()
    assert total == 0 and not maps.grad.any()


def test_equal_views_cost_nothing():
    cam = torch.rand(2, 4, 6, 5)
    full = with_background(cam)
    assert equivariant_regularization(cam, cam) == 0
    assert equivariant_cross_regularization(strongest_only(full), full) == 0


def test_background_and_strongest_class_share_a_pixel():
    full = strongest_only(with_background(torch.rand(2, 4, 6, 5)))
    assert_close(full.sum(1), torch.ones(2, 6, 5))
    assert (full[:, 1:] > 0).sum(1).eq(1).all()


def test_hardest_entries_of_every_image_count_and_the_target_learns_nothing():
    refined, target = torch.rand(2, 3, 4, 5, requires_grad=True), torch.zeros(2, 3, 4, 5, requires_grad=True)
    loss = equivariant_cross_regularization(refined, target)
    loss.backward()
    largest = refined.detach().flatten(1).sort(1, descending=True).values[:, :12]
    assert_close(loss, largest.mean())
    assert target.grad is None
    assert refined.grad.flatten(1).ne(0).sum(1).tolist() == [12, 12]


def test_maps_of_one_pixel_give_finite_losses():
    maps = torch.rand(1, 3, 1, 1)
    assert min_pool_loss(maps).isfinite()
    assert equivariant_cross_regularization(maps, maps).isfinite()
