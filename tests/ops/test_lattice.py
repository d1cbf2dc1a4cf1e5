"""The lattice filter: recorded values, linear algebra that must hold, the Gaussian sum it approximates."""

from __future__ import annotations

import pytest
import torch

from ops.lattice import PermutohedralLattice, bilateral_features, spatial_features
from tests.recorded import recorded


def exact_gaussian_filter(features, values, chunk=1024):
    """The sum that the lattice approximates, by all N^2 pairs: an oracle for small images.

    Args:
        features: (B, N, d). values: (B, N, C). chunk: rows of the pair matrix in memory at once.

    Returns:
        (B, N, C) in float64: ``out_i = sum_j exp(-|f_i - f_j|^2 / 2) in_j``.
    """
    features, values = features.double(), values.double()
    rows = [
        torch.cdist(part, features).square().mul(-0.5).exp() @ values for part in features.split(chunk, dim=1)
    ]
    return torch.cat(rows, dim=1)


def smooth_image(batch=1, height=24, width=30, seed=0):
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(batch, 3, 4, 5, generator=generator) * 255
    return torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear").round()


def noise_values(lattice, channels=3, seed=0):
    shape = (lattice.batch, lattice.points_per_image, channels)
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


@recorded("bilateral_filter")
def test_matches_reference_values(case):
    for item in (key.removesuffix("_out") for key in case if key.endswith("_out")):
        images, values = case[f"{item}_images"].permute(0, 3, 1, 2), case[f"{item}_in"]
        sigma_rgb, sigma_xy = case[f"{item}_sigmas"].tolist()
        lattice = PermutohedralLattice(bilateral_features(images, sigma_xy, sigma_rgb))
        filtered = lattice.filter(values.flatten(2).transpose(1, 2)).transpose(1, 2).view_as(values)
        case.compare(f"{item}_out", filtered, rtol=0, atol=0, share=2e-6)
    case.irrelevant("tag")


def test_adjoint_is_the_transpose_and_nearly_the_filter():
    lattice = PermutohedralLattice(bilateral_features(smooth_image(2, 17, 19), 8.0, 25.0))
    x, y = noise_values(lattice, 2, seed=1).double(), noise_values(lattice, 2, seed=2).double()
    forward = (y * lattice.filter(x.float())).sum()
    backward = (lattice.filter(y.float(), adjoint=True) * x).sum()
    torch.testing.assert_close(forward, backward, rtol=1e-6, atol=0)
    # Passes along different axes do not commute at the rim of the point set, so the matrix is not quite
    # symmetric.
    swapped = (lattice.filter(y.float()) * x).sum()
    assert 1e-7 < abs(swapped / forward - 1) < 1e-2


def test_gradient_is_the_adjoint():
    lattice = PermutohedralLattice(spatial_features(9, 11, 2.0))
    x = noise_values(lattice, 2).requires_grad_()
    grad = noise_values(lattice, 2, seed=3)
    (result,) = torch.autograd.grad(lattice.filter(x), x, grad)
    assert torch.equal(result, lattice.filter(grad, adjoint=True))


def test_batch_equals_images_one_by_one():
    """Images of different colours, and a pixel count that needs padding."""
    images = torch.cat([smooth_image(1, 15, 17, seed=k) for k in range(3)])
    together = PermutohedralLattice(bilateral_features(images, 12.0, 10.0))
    x = noise_values(together)
    alone = [PermutohedralLattice(bilateral_features(image[None], 12.0, 10.0)) for image in images]
    assert together.num_points == sum(lattice.num_points for lattice in alone)
    expected = torch.cat([lattice.filter(part[None]) for lattice, part in zip(alone, x, strict=True)])
    torch.testing.assert_close(together.filter(x), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("piece", [2, 5])
def test_splitting_long_bags_changes_nothing(piece):
    """A flat image puts hundreds of pixels into one bag."""
    image = torch.full((1, 3, 20, 33), 90.0)
    image[..., :5] = 200
    features = bilateral_features(image, 30.0, 10.0)
    whole, split = PermutohedralLattice(features), PermutohedralLattice(features, piece=piece)
    x = noise_values(whole)
    torch.testing.assert_close(split.filter(x), whole.filter(x), rtol=1e-5, atol=0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("adjoint", [False, True])
def test_cpu_and_cuda_agree_and_cuda_repeats_itself(adjoint):
    """A flat image: bags of hundreds of pixels, which the GPU sums in pieces."""
    image = torch.full((1, 3, 40, 33), 90.0)
    image[..., :5] = 200
    features = bilateral_features(image, 30.0, 10.0)
    cpu, cuda = PermutohedralLattice(features), PermutohedralLattice(features.cuda())
    x = noise_values(cpu)
    first, second = (cuda.filter(x.cuda(), adjoint=adjoint) for _ in range(2))
    assert torch.equal(first, second) and len(cuda.splat_offsets) > 1
    torch.testing.assert_close(first.cpu(), cpu.filter(x, adjoint=adjoint), rtol=1e-4, atol=1e-5)


def test_keys_that_leave_no_room_for_the_pixel_number_give_the_same():
    """One far point makes the keys so long that pixels have to be sorted along, on another path."""
    near = torch.rand(1, 60, 5, generator=torch.Generator().manual_seed(0)) * 4
    wide = PermutohedralLattice(torch.cat([near, torch.full((1, 1, 5), 12000.0)], dim=1), pad_to_four=False)
    compact = PermutohedralLattice(near)
    x = noise_values(wide, 2)
    torch.testing.assert_close(wide.filter(x)[:, :-1], compact.filter(x[:, :-1]), rtol=1e-6, atol=1e-6)
    assert wide.num_points == compact.num_points + 6


@pytest.mark.parametrize("sigma_rgb", [20.0, 40.0])
def test_approximates_the_exact_gaussian_filter(sigma_rgb):
    """A documented approximation: once both are normalised they differ by a few hundredths."""
    image = smooth_image(1, 32, 40)
    features = bilateral_features(image, 15.0, sigma_rgb)
    step = (torch.arange(features.shape[1]) % 40 > 20).float().view(1, -1, 1)
    ones = torch.ones_like(step)
    lattice = PermutohedralLattice(features)
    approximate = lattice.filter(step) / lattice.filter(ones)
    exact = (exact_gaussian_filter(features, step) / exact_gaussian_filter(features, ones)).float()
    assert (approximate - exact).abs().mean() < 0.03
    assert torch.corrcoef(torch.stack([approximate.flatten(), exact.flatten()]))[0, 1] > 0.99


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (torch.zeros(0, 4, 5), "non-empty"),
        (torch.tensor([[[0.0, float("nan")]]]), "NaN"),
        (torch.tensor([[[0.0, 0.0], [0.0, 1e8]]]), "enlarge sigmas"),
        (torch.eye(5)[None] * 3e5, "overflow"),
    ],
)
def test_bad_features_are_one_clear_error(features, message):
    with pytest.raises(ValueError, match=message):
        PermutohedralLattice(features)
