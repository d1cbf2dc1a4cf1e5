"""Random walks over pixel affinities, against the dense transition matrices that they replace."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from models.refiners.random_walk import propagate_to_edge, random_walk, transition_weights
from ops.pairs import PathPairs, PixelPairs


def dense_affinity(affinity, pairs, size):
    """(hw, hw) of pair affinities (P, N), symmetric, 1 on the diagonal."""
    src, dst = pairs.indices(size)
    dense = torch.eye(size[0] * size[1])
    dense[src.expand_as(dst), dst] = affinity
    dense[dst, src.expand_as(dst)] = affinity
    return dense


def dense_transition(dense, beta, exp_times):
    """Columns that sum to one, squared ``exp_times`` times, as in the authors' programs."""
    transition = dense**beta
    transition = transition / transition.sum(0, keepdim=True)
    for _ in range(exp_times):
        transition = transition @ transition
    return transition


def random_inputs(pairs, size, k=3):
    generator = torch.Generator().manual_seed(0)
    rows, columns = pairs.grid(size)
    affinity = torch.rand(len(pairs.directions), rows * columns, generator=generator)
    return torch.rand(k, *size, generator=generator), affinity


@pytest.mark.parametrize("pairs", [PixelPairs(5), PathPairs(3), PixelPairs(1)])
@pytest.mark.parametrize("beta, exp_times", [(8, 8), (1.5, 0), (4, 3)])
def test_walk_equals_squaring_of_the_dense_matrix(pairs, beta, exp_times):
    size = (11, 13)
    scores, affinity = random_inputs(pairs, size)
    transition = dense_transition(dense_affinity(affinity, pairs, size), beta, exp_times)
    expected = (scores.flatten(1) @ transition).view_as(scores)
    found = random_walk(scores, affinity, pairs, beta, 2**exp_times)
    assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_walk_to_edges_matches_reference_values(golden):
    case = golden("ms_propagate_to_edge")
    cam, edge = inputs(case)
    assert_close(propagate_to_edge(cam, edge), case["rw_default"][:, 0], rtol=1e-4, atol=1e-4)
    short = propagate_to_edge(cam, edge, beta=4, exp_times=2)
    assert_close(short, case["rw_b4e2"][:, 0], rtol=1e-5, atol=1e-5)
    near = propagate_to_edge(cam, edge, radius=3, beta=2, exp_times=1)
    assert_close(near, case["rw_r3"][:, 0], rtol=1e-5, atol=1e-5)


def test_affinity_and_transition_matrices_match_reference_values(golden):
    case = golden("ms_propagate_to_edge")
    _, edge = inputs(case)
    pairs, (h, w) = PathPairs(5), edge.shape
    walled = F.pad(edge, (5, 5, 0, 5), value=1.0)
    affinity = 1 - pairs.path_max(walled)
    assert_close(affinity[None], case["sparse_affinity"], rtol=1e-5, atol=1e-5)
    padded = (h + 5, w + 10)
    inside = torch.arange(padded[0] * padded[1]).view(padded)[:h, 5 : 5 + w].flatten()
    dense = dense_affinity(affinity, pairs, padded)[inside][:, inside]
    assert_close(dense, case["dense_affinity"], rtol=1e-5, atol=1e-5)

    # Walking from every pixel at once writes the rows of the transition matrix.
    everywhere = torch.zeros(h * w, *padded)
    everywhere[:, :h, 5 : 5 + w] = torch.eye(h * w).view(-1, h, w)
    for name, steps, tolerance in (("e0", 1, 1e-5), ("e8", 256, 1e-4)):
        walked = random_walk(everywhere, affinity, pairs, 10, steps)[:, :h, 5 : 5 + w].flatten(1)
        assert_close(walked, case[f"transition_b10_{name}"], rtol=tolerance, atol=tolerance)


def inputs(case):
    spec = case.meta["inputs"]
    cam, edge = (case.arr(s["name"], s["shape"], s["low"], s["high"]) for s in (spec["cam"], spec["edge"]))
    return cam, edge[0] ** case.setting("edge_power", 2)


def test_transition_weights_sum_to_one():
    pairs, size = PixelPairs(4), (9, 10)
    weights, offsets = transition_weights(random_inputs(pairs, size)[1], pairs, size, beta=3)
    assert len(weights) == len(offsets) == 1 + 2 * len(pairs.directions)
    assert_close(weights.sum(0), torch.ones(size))


def test_constants_and_pixels_behind_boundaries_keep_their_score():
    edge = torch.zeros(12, 15)
    edge[:, 7] = 1
    cam = torch.zeros(2, 12, 15)
    cam[0, :, :7], cam[1, :, 8:] = 1, 0.5
    walked = propagate_to_edge(cam, edge)
    assert_close(walked[..., :7], cam[..., :7], rtol=1e-4, atol=1e-5)
    assert_close(walked[..., 8:], cam[..., 8:], rtol=1e-4, atol=1e-5)


def test_scores_stay_in_their_range_and_zero_stays_zero():
    cam = torch.rand(3, 10, 10, generator=torch.Generator().manual_seed(0))
    cam[1] = 0
    walked = propagate_to_edge(cam, torch.rand(10, 10, generator=torch.Generator().manual_seed(1)))
    assert walked.isfinite().all() and walked.min() >= 0 and walked.max() <= cam.max()
    assert not walked[1].any()


def test_exponent_zero_is_refused():
    pairs = PixelPairs(3)
    scores, affinity = random_inputs(pairs, (8, 8))
    with pytest.raises(ValueError, match="above 0"):
        random_walk(scores, affinity, pairs, 0, 4)
