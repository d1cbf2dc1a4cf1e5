"""Pixel pairs and the paths between them."""

import pytest
import torch

from losses.affinity import pair_label
from ops.pairs import PathPairs, PixelPairs, fitting_radius, seam_radius
from tests.methods.recorded import radius_of
from tests.recorded import recorded


def configs(case):
    """(tag, radius, size) of the recorded cases of a file."""
    tags = [key.split("_")[0] for key in case if key.endswith("_config")]
    return [(tag, int(r), (int(h), int(w))) for tag in tags for r, h, w in [case[f"{tag}_config"]]]


@recorded("ms_path_index")
def test_paths_match_reference_values(case):
    for tag, radius, size in configs(case):
        pairs = PathPairs(radius)
        src, dst = pairs.indices(size)
        numbers = torch.arange(size[0] * size[1]).view(size)
        paths = [pairs.at(numbers, group) for group in pairs.paths]  # (n, L, N) each
        case.same(f"{tag}_search_dst", pairs.directions)
        case.same(f"{tag}_group_shapes", [list(p.shape) for p in paths])
        case.same(f"{tag}_sums", [x.sum().item() for x in (src, dst, *paths)])
        for i, (group, path) in enumerate(zip(pairs.paths, paths)):
            case.same(f"{tag}_paths{i}", group)
            case.same(f"{tag}_path_indices{i}", path)
        case.same(f"{tag}_src", src)
        case.same(f"{tag}_dst", dst)


@recorded("ms_psa_pairs")
def test_plain_pairs_match_reference_values(case):
    for tag, radius, size in configs(case):
        src, dst = PixelPairs(radius).indices(size)
        to = dst.flatten()
        case.same(f"{tag}_shapes", [len(src), len(to)])
        weighted = (to * torch.arange(len(to))).sum()
        case.same(f"{tag}_sums", [src.sum(), to.sum(), weighted])
        case.same(f"{tag}_from", src)
        case.same(f"{tag}_to", to)
    check_labels(case, PixelPairs)


@recorded("ms_irn_pair_labels")
def test_labels_of_path_pairs_match_reference_values(case):
    check_labels(case, PathPairs)


def check_labels(case, pairs_of):
    """Recorded labels of the pairs of a label map."""
    pairs = pairs_of(radius_of(len(case["neg"])))
    for kind, found in pair_label(case["label_map"].long()[None], pairs)._asdict().items():
        case.same(kind, found[0])


@pytest.mark.parametrize("radius, size", [(3, (4, 7)), (5, (9, 12))])
def test_path_maximum_and_its_gradient_are_those_of_the_gathered_paths(radius, size):
    pairs = PathPairs(radius)
    numbers = torch.arange(size[0] * size[1]).view(size)
    maps = torch.randn(2, *size, requires_grad=True, generator=torch.Generator().manual_seed(0))
    gathered = [maps.flatten(1)[:, pairs.at(numbers, group)].amax(2) for group in pairs.paths]
    expected = torch.cat(gathered, 1)
    found = pairs.path_max(maps)
    assert torch.equal(found, expected)
    weight = torch.randn(found.shape, generator=torch.Generator().manual_seed(1))
    gradients = [torch.autograd.grad((x * weight).sum(), maps)[0] for x in (found, expected)]
    torch.testing.assert_close(*gradients)


def test_a_map_without_pairs_is_an_error_and_a_fitting_radius_avoids_it():
    with pytest.raises(ValueError, match=r"\(4, 20\) has no pixel pairs of radius 5"):
        PixelPairs(5).source(torch.zeros(4, 20))
    with pytest.raises(ValueError, match="at least 1"):
        PixelPairs(0)
    for rule in (fitting_radius, seam_radius):
        for size in ((height, width) for height in range(1, 12) for width in (3, 9, 10)):
            assert PixelPairs(rule(5, size)).source(torch.zeros(size)).numel() > 0


def test_only_seam_shrinks_the_radius_on_grids_that_hold_it():
    count = lambda rule, size: tuple(PixelPairs(rule(5, size)).indices(size)[1].shape)  # noqa: E731
    assert count(fitting_radius, (12, 10)) == (34, 16)  # as PSA's program
    assert count(seam_radius, (12, 10)) == (22, 36)
    assert fitting_radius(5, (5, 9)) == 5 and fitting_radius(5, (4, 9)) == fitting_radius(5, (5, 8)) == 4
    assert seam_radius(5, (11, 40)) == 5 and seam_radius(5, (10, 40)) == 4
