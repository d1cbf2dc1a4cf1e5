"""SEAM's losses: the authors' values, and what must hold for any maps."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from losses.equivariance import (
    equivariant_cross_regularization,
    equivariant_regularization,
    max_norm,
    min_pool_loss,
    strongest_only,
    with_background,
)

CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def test_max_norm_matches_reference_values_and_gradient(golden):
    case = golden("ms_seam_functions")
    x, w = case.input("x").requires_grad_(), case.input("w")
    normed = max_norm(x)
    assert_close(normed[:, ::4], case["max_norm"], **CLOSE)
    assert_close(max_norm(x[0])[::4], case["max_norm_3d"], **CLOSE)
    (gradient,) = torch.autograd.grad((normed * w).sum(), x)
    assert_close(gradient[:, ::4], case["max_norm_grad"], **CLOSE)


def test_min_pool_matches_reference_values_and_gradient(golden):
    case = golden("ms_seam_functions")
    x = case.input("x").requires_grad_()
    loss = min_pool_loss(x[:, 1:])
    assert_close(loss, case["minpool"], **CLOSE)
    (gradient,) = torch.autograd.grad(loss, x)
    assert_close(gradient.sum(1), case["minpool_grad_sum_over_channels"], **CLOSE)
    assert_close(min_pool_loss(x[:, 1:] - 1.2), case["minpool_shifted"], **CLOSE)


def test_strongest_only_matches_reference_values(golden):
    case = golden("ms_seam_functions")
    kept = strongest_only(case.input("x"))
    assert_close(kept[:, ::4], case["max_onehot"], **CLOSE)
    assert int((kept[:, 1:] != 0).sum()) == int(case["max_onehot_count"])


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


def test_half_precision_maps_give_float32_losses():
    maps = with_background(torch.rand(1, 3, 8, 8)).bfloat16()
    smaller = F.avg_pool2d(maps.float(), 2).bfloat16()
    refined = F.interpolate(smaller, size=(8, 8))
    for loss in (
        min_pool_loss(maps),
        equivariant_regularization(maps, refined),
        equivariant_cross_regularization(maps, refined),
    ):
        assert loss.dtype == torch.float32
