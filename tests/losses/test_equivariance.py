"""SEAM's losses: the authors' values, and what must hold for any maps."""

import torch

from losses.equivariance import equivariant_cross_regularization, max_norm, min_pool_loss, strongest_only
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


def test_maps_of_one_pixel_give_finite_losses():
    maps = torch.rand(1, 3, 1, 1)
    assert min_pool_loss(maps).isfinite()
    assert equivariant_cross_regularization(maps, maps).isfinite()
